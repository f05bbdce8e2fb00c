"""The clock of a request: hand-worked, and the identities that hold for any of them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.metrics import goodput, percentiles, request_metrics, throughput


def test_four_tokens_worked_by_hand():
    metrics = request_metrics(10.0, [10.5, 10.6, 10.9, 11.1], num_prompt_tokens=7,
                              num_cached_tokens=3)
    assert metrics.num_prompt_tokens == 7
    assert metrics.num_cached_tokens == 3
    assert metrics.num_output_tokens == 4
    assert metrics.ttft_ms == pytest.approx(500)
    assert metrics.itl_ms == pytest.approx([100, 300, 200])
    assert metrics.tpot_ms == pytest.approx(200)  # (1100 - 500) / 3
    assert metrics.e2e_ms == pytest.approx(1100)
    assert metrics.decode_tokens_per_s == pytest.approx(5)


def test_one_token_has_no_time_per_further_token():
    metrics = request_metrics(2.0, [2.25])
    assert metrics.ttft_ms == metrics.e2e_ms == 250
    assert metrics.itl_ms == []
    assert metrics.tpot_ms is None
    assert metrics.decode_tokens_per_s is None


def test_a_request_without_a_token_has_no_times():
    metrics = request_metrics(2.0, [])
    assert metrics.num_output_tokens == 0
    assert metrics.ttft_ms is metrics.e2e_ms is metrics.tpot_ms is None


def test_a_clock_that_stands_still_divides_by_nothing():
    metrics = request_metrics(2.0, [2.0, 2.0])
    assert metrics.tpot_ms == 0
    assert metrics.decode_tokens_per_s is None


@given(st.lists(st.floats(0.001, 100), min_size=2, max_size=20))
def test_the_parts_add_up(gaps_s):
    metrics = request_metrics(50.0, 50.0 + np.cumsum(gaps_s))
    assert metrics.ttft_ms + sum(metrics.itl_ms) == pytest.approx(metrics.e2e_ms)
    assert metrics.tpot_ms == pytest.approx(np.mean(metrics.itl_ms))
    assert len(metrics.itl_ms) == metrics.num_output_tokens - 1


def test_metrics_are_a_record_and_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_metrics(0.0, [1.0]).ttft_ms = 0


def test_throughput_worked_by_hand():
    requests = [request_metrics(0.0, [1.0, 2.0], num_prompt_tokens=5),
                request_metrics(1.0, [3.0, 3.5, 4.0], num_prompt_tokens=10, num_cached_tokens=8)]
    done = throughput(requests, duration_s=4.0)
    assert done.requests_per_s == 0.5
    assert done.output_tokens_per_s == 1.25
    assert done.total_tokens_per_s == 5.0


def test_percentiles_worked_by_hand():
    """101 values, so that every percentile is one of them."""
    values = [3.0 * each for each in range(101)]
    assert percentiles(values[::-1]) == {50: 150, 95: 285, 99: 297}
    assert percentiles([7.0]) == {50: 7, 95: 7, 99: 7}
    assert percentiles([None]) == percentiles([]) == {}


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), min_size=1, max_size=50))
def test_no_percentile_lies_outside_of_the_values(values):
    known = [value for value in values if value is not None]
    found = list(percentiles(values).values())
    assert found == sorted(found)
    assert all(min(known) <= each <= max(known) for each in found)


@pytest.mark.parametrize("max_ttft_ms, max_tpot_ms, num_good", [
    (1e9, 1e9, 3), (500, 1e9, 2), (499, 1e9, 1), (1e9, 250, 3), (1e9, 249, 2), (1e9, 124, 1),
    (500, 125, 1), (500, 124, 0), (2000, 124, 1)])
def test_goodput_counts_who_met_both_objectives(max_ttft_ms, max_tpot_ms, num_good):
    requests = [request_metrics(0.0, [0.5, 0.625, 0.75]),  # TTFT 500 ms, TPOT 125 ms
                request_metrics(0.0, [0.25, 0.5]),  # TTFT 250 ms, TPOT 250 ms
                request_metrics(0.0, [2.0]),  # one token
                request_metrics(0.0, [])]  # it never began
    assert goodput(requests, 10.0, max_ttft_ms, max_tpot_ms) == num_good / 10

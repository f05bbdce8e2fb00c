"""The clock of a request: hand-worked, and the identities that hold for any of them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.metrics import request_metrics


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

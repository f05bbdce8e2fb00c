"""Sampling against hand-worked numbers, against transformers, and the twins against each other."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as oracle

from minillm import penalties as p
from minillm import sampling as s
from minillm.errors import InputError
from minillm.sampling import SamplingParams

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, cuda])]


def random_logits(seed, size=997, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def kept(logits):
    return np.flatnonzero(np.asarray(logits) > -np.inf).tolist()


def same(logits_np, logits_torch):
    np.testing.assert_allclose(logits_torch.cpu().numpy(), logits_np, rtol=1e-12, atol=1e-12)


# ── SamplingParams ───────────────────────────────────────────────────────────────────────────────

OUT_OF_BOUNDS = {
    "temperature": [-0.1, math.nan, math.inf, 10**400, True, "1", None],
    "top_k": [-2, 1.0, 2.5, True, "5", None, math.nan],
    "top_p": [0, -0.5, 1.0001, math.nan, True, "0.9", None],
    "min_p": [-0.01, 1.01, math.nan, False, "0", None],
    "repetition_penalty": [0, -1.0, math.nan, math.inf, np.float32(np.inf), True, "1", None],
    "presence_penalty": [-2.01, 2.01, math.nan, True, "0", None],
    "frequency_penalty": [-2.01, 2.01, math.nan, True, "0", None],
    "logit_bias": [[1, 2], "x", {-1: 1.0}, {"-1": 1.0}, {"a": 1.0}, {"": 1.0}, {"1_0": 1.0},
                   {"²": 1.0}, {1.0: 1.0}, {True: 1.0}, {None: 1.0}, {"9" * 5000: 1.0},
                   {1: math.nan}, {1: math.inf}, {1: "2"}, {1: True}, {1: None},
                   {1: 2.0, "1": 2.0}],
    "stop": [5, "", [""], ["a", ""], ["a", 5], ["a", None], {"a": 1}, b"a", ["x"] * 17],
    "seed": [-1, 2**64, 1.0, True, "1", math.nan],
    "max_tokens": [0, -1, 1.5, 5.0, True, "5", None],
    "min_tokens": [-1, 65, 0.0, True, "0", None],
    "ignore_eos": [1, 0, "true", None],
    "logprobs": [-1, 21, 1.0, True, "1"],
    "n": [0, -1, 65, 10**9, 1.0, True, "1", None],
}


@pytest.mark.parametrize("name,value", [(k, v) for k, vs in OUT_OF_BOUNDS.items() for v in vs],
                         ids=lambda x: x if isinstance(x, str) and len(x) < 30 else None)
def test_refuses_in_one_line_that_names_the_parameter(name, value):
    with pytest.raises(InputError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and "must" in message
    assert "\n" not in message and len(message) < 200


def test_every_field_has_a_refusal_above():
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(OUT_OF_BOUNDS)


@pytest.mark.parametrize("name,value", [
    ("temperature", 0), ("temperature", 1e300), ("temperature", np.float16(0.5)), ("top_k", -1),
    ("top_k", 10**9), ("top_k", np.int32(3)), ("top_p", 1), ("top_p", 5e-324), ("min_p", 0),
    ("min_p", 1), ("repetition_penalty", 0.001), ("presence_penalty", -2),
    ("presence_penalty", 2), ("frequency_penalty", -2), ("frequency_penalty", 2), ("seed", None),
    ("seed", 0), ("seed", 2**64 - 1), ("max_tokens", 1), ("min_tokens", 64), ("logprobs", None),
    ("logprobs", 0), ("logprobs", 20), ("n", 64), ("ignore_eos", np.bool_(True)),
])
def test_accepts_the_bounds_themselves_as_plain_python_values(name, value):
    accepted = getattr(SamplingParams(**{name: value}), name)
    assert accepted == value
    assert type(accepted).__module__ == "builtins"


def test_refusals_that_take_two_fields():
    with pytest.raises(InputError, match="^min_tokens is 5, must be at most max_tokens, .* 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InputError, match="^n is 2, must be 1 at temperature 0"):
        SamplingParams(n=2, temperature=0)


def test_defaults_switch_every_step_off():
    logits = random_logits(0)
    np.testing.assert_array_equal(p.process_logits_np(logits, SamplingParams(), [1], [2], [3]),
                                  logits)
    np.testing.assert_array_equal(s.probabilities_np(logits, SamplingParams()),
                                  s.softmax_np(logits))


def test_stop_and_logit_bias_are_normalised():
    assert SamplingParams().stop == ()
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"] * 8).stop == ("a", "b") * 8
    mine = {"15": 2, 7: -1e6, np.int64(8): np.float32(101)}
    params = SamplingParams(logit_bias=mine)
    assert params.logit_bias == {15: 2.0, 7: -100.0, 8: 100.0}
    mine["16"] = 1.0
    assert len(params.logit_bias) == 3  # a copy
    assert dataclasses.replace(params, top_k=3).logit_bias == params.logit_bias


def test_check_vocab():
    SamplingParams().check_vocab(1)
    SamplingParams(logit_bias={"9": 1}).check_vocab(10)
    with pytest.raises(InputError, match="token 9, .* vocabulary size 9"):
        SamplingParams(logit_bias={"9": 1}).check_vocab(9)


def test_params_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5


# ── hand-worked steps ────────────────────────────────────────────────────────────────────────────

def test_min_tokens_forbids_the_end_only_until_then():
    params = SamplingParams(temperature=0, min_tokens=2)
    logits = np.array([1, 2, 3, 4], np.float32)
    assert s.sample_np(logits, params, 0.0, [], [0], stop_token_ids=[2, 3]) == 1
    assert s.sample_np(logits, params, 0.0, [], [0, 0], stop_token_ids=[2, 3]) == 3
    assert s.sample_np(logits, params, 0.0, [], [0]) == 3  # no token ends this text


def test_a_forbidden_end_stays_forbidden_whatever_the_bias():
    params = SamplingParams(temperature=0, min_tokens=1, logit_bias={1: 100})
    assert s.sample_np(np.array([1, 0, 2]), params, 0.0, stop_token_ids=[1]) == 2


def test_repetition_counts_prompt_and_output_the_others_only_output():
    logits = np.array([2.0, 2.0, 2.0, -2.0])
    process = p.process_logits_np
    got = process(logits, SamplingParams(repetition_penalty=2), [0, 0, 3], [1, 1], [])
    assert got.tolist() == [1, 1, 2, -4]
    got = process(logits, SamplingParams(frequency_penalty=0.5), [0, 0, 3], [1, 1], [])
    assert got.tolist() == [2, 1, 2, -2]
    got = process(logits, SamplingParams(presence_penalty=0.5), [0, 0, 3], [1, 1], [])
    assert got.tolist() == [2, 1.5, 2, -2]


def test_frequency_and_presence_against_a_plain_loop():
    rng = np.random.default_rng(3)
    logits, output = random_logits(4, 50), rng.integers(0, 50, 80).tolist()
    expected = [float(x) - 0.3 * output.count(i) - 1.1 * (i in output)
                for i, x in enumerate(logits)]
    np.testing.assert_allclose(p.penalize_frequency_np(logits, 0.3, 1.1, output), expected)


def test_nothing_to_penalize_yet():
    params = SamplingParams(repetition_penalty=2, frequency_penalty=1)
    logits = random_logits(1, 7)
    same(p.process_logits_np(logits, params, [], [], []),
         p.process_logits_torch(torch.from_numpy(logits), params, [], [], []))


def test_ties():
    equal = np.zeros(10, np.float32)
    assert kept(s.top_k_np(equal, 3)) == list(range(10))  # all equal the third
    assert kept(s.top_k_np(np.array([5.0, 1.0, 1.0, 0.0]), 2)) == [0, 1, 2]
    assert kept(s.top_p_np(equal, 0.3)) == [0, 1, 2]  # the fewest, and the lower ids
    assert kept(s.top_p_np(equal, 5e-324)) == [0]
    assert kept(s.top_p_np(np.array([1.0, 3.0, 1.0, 3.0, 1.0]), 0.85)) == [0, 1, 3]
    assert kept(s.min_p_np(np.array([2.0, 1.0, 2.0]), 1.0)) == [0, 2]
    assert s.sample_np(np.array([1.0, 4.0, 4.0]), SamplingParams(temperature=0), 0.9) == 1


def test_a_nucleus_that_is_full_but_for_rounding_is_full():
    for top_p, size in ((0.5, 1), (0.8, 2), (0.9, 3), (0.91, 4), (1.0, 4)):
        assert kept(s.top_p_np(np.log([0.5, 0.3, 0.1, 0.1]), top_p)) == list(range(size))
    assert len(kept(s.top_p_np(np.array([0.0, -80.0]), 1.0))) == 2  # e^-80 vanishes in 1 + e^-80


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert kept(s.top_k_np(np.arange(4.0), 9)) == kept(s.top_k_torch(torch.arange(4.0), 9))


# ── the order of the steps: each example ends differently if two steps change places ─────────────

def both(logits, params, u, *ids):
    token = s.sample_np(np.array(logits, np.float64), params, u, *ids)
    assert s.sample_torch(torch.tensor(logits, dtype=torch.float64), params, u, *ids) == token
    return token


def test_bias_comes_before_penalties():
    # bias first: (1 + 3) / 2 = 2 < 3; penalty first: 1 / 2 + 3 = 3.5 > 3
    params = SamplingParams(temperature=0, logit_bias={0: 3}, repetition_penalty=2)
    assert both([1, 3], params, 0.0, [0]) == 1


def test_repetition_comes_before_frequency():
    # repetition first: 4 / 2 - 1 = 1 < 1.2; frequency first: (4 - 1) / 2 = 1.5 > 1.2
    params = SamplingParams(temperature=0, repetition_penalty=2, frequency_penalty=1)
    assert both([4, 1.2], params, 0.0, [], [0]) == 1


def test_penalties_come_before_greedy():
    assert both([4, 3], SamplingParams(temperature=0, presence_penalty=2), 0.0, [], [0]) == 1


def test_penalties_come_before_temperature():
    # penalty first: (2 - 2) / 0.1 = 0 against 0.1 / 0.1 = 1; temperature first: 18 against 1
    params = SamplingParams(temperature=0.1, presence_penalty=2, top_k=1)
    assert both([2, 0.1], params, 0.5, [], [0]) == 1


def test_temperature_comes_before_min_p():
    # at temperature 2 the ratio e^-1 becomes e^-0.5 = 0.61, above 0.5
    assert both([1, 0], SamplingParams(temperature=2, min_p=0.5), 0.99) == 1
    assert both([1, 0], SamplingParams(temperature=1, min_p=0.5), 0.99) == 0


def test_temperature_comes_before_top_p():
    # softmax([1, 0]) is (0.73, 0.27), at temperature 2 it is (0.62, 0.38)
    assert both([1, 0], SamplingParams(temperature=2, top_p=0.7), 0.99) == 1
    assert both([1, 0], SamplingParams(temperature=1, top_p=0.7), 0.99) == 0


def test_min_p_comes_before_top_p():
    # min_p leaves (0.4, 0.4) of (0.4, 0.4, 0.1, 0.1), that is (0.5, 0.5): top_p=0.45 keeps one;
    # in the other order top_p=0.45 keeps two of 0.4
    probs = [0.4, 0.4, 0.1, 0.1]
    assert both(np.log(probs), SamplingParams(min_p=0.5, top_p=0.45), 0.99) == 0
    assert both(np.log(probs), SamplingParams(top_p=0.45), 0.99) == 1


def test_top_k_comes_before_top_p():
    # top_k leaves (0.625, 0.375) of (0.5, 0.3, 0.2): top_p=0.6 keeps one; without top_k, two
    probs = [0.5, 0.3, 0.2]
    assert both(np.log(probs), SamplingParams(top_k=2, top_p=0.6), 0.99) == 0
    assert both(np.log(probs), SamplingParams(top_p=0.6), 0.99) == 1


def test_greedy_ignores_what_cannot_change_the_best():
    params = SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    assert both([1, 5, 2], params, math.nan) == 1  # u is not read
    assert both([1, 5, 2], SamplingParams(temperature=1e-6), 0.99) == 1


# ── the draw ─────────────────────────────────────────────────────────────────────────────────────

LAST_U = math.nextafter(1.0, 0.0)


def test_the_last_u_never_draws_an_impossible_token():
    probs = np.full(1000, 0.1)
    probs[[0, -1]] = 0  # sums of 0.1 miss their total; a zero waits at either end
    probs /= probs.sum()
    for scale in (1.0, 1 - 1e-12, 1 + 1e-12):
        assert s.draw_np(probs * scale, LAST_U) == 998
        assert s.draw_torch(torch.from_numpy(probs * scale), LAST_U) == 998
        assert s.draw_np(probs * scale, 0.0) == s.draw_torch(torch.from_numpy(probs), 0.0) == 1


def test_draws_follow_the_distribution():
    params = SamplingParams(temperature=0.8, top_k=6, min_p=0.02)
    logits = np.array([2.0, 1.0, 0.5, 0.0, 1.5, -1.0, 0.7, -4.0], np.float32)
    probs, rng, num_draws = s.probabilities_np(logits, params), s.request_rng(5, 0), 4000
    tokens = [s.sample_np(logits, params, rng.random()) for _ in range(num_draws)]
    counts = np.bincount(tokens, minlength=len(logits))
    possible = probs > 0
    assert possible.sum() == 6 and not counts[~possible].any()
    expected = num_draws * probs[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in 1000 seeds


def test_request_rng():
    def stream(seed, index):
        return s.request_rng(seed, index).random(4).tolist()

    assert stream(7, 0) == stream(7, 0)
    streams = [stream(seed, index) for seed in (0, 7, 8, 2**32, 2**64 - 1) for index in (0, 1, 2)]
    assert len({tuple(x) for x in streams}) == 15
    assert stream(None, 0) != stream(None, 0)
    rng, other = s.request_rng(7, 0), s.request_rng(7, 1)
    interleaved = [(rng.random(), other.random())[0] for _ in range(4)]
    assert interleaved == stream(7, 0)  # whatever else runs


# ── what the model must not give us ──────────────────────────────────────────────────────────────

@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_p=0.5)])
def test_logits_that_overflowed_are_an_error_not_a_token(bad, params):
    for place in (0, 5, 9):
        logits = random_logits(0, 10)
        logits[place] = bad
        for sample, x in ((s.sample_np, logits), (s.sample_torch, torch.from_numpy(logits))):
            with pytest.raises(FloatingPointError, match="best logit is (nan|inf)"):
                sample(x, params, 0.5)


def test_one_possible_token_is_drawn_and_none_is_an_error():
    logits = np.full(6, -np.inf, np.float32)
    with pytest.raises(FloatingPointError, match="-inf"):
        s.sample_np(logits, SamplingParams(), 0.5)
    logits[4] = -7
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=3, top_p=0.2, min_p=0.1)):
        for u in (0.0, 0.5, LAST_U):
            assert both(logits, params, u) == 4
    with pytest.raises(FloatingPointError):
        s.sample_np(logits, SamplingParams(min_tokens=1), 0.5, stop_token_ids=[4])


def test_a_bias_on_every_token_is_harmless():
    params = SamplingParams(logit_bias={i: -100 for i in range(5)}, temperature=0)
    assert both([1, 2, 5, 4, 3], params, 0.5) == 2


def test_extreme_temperatures():
    logits = [3.0, 3.5, -80.0]
    assert both(logits, SamplingParams(temperature=1e-5), LAST_U) == 1
    assert both(logits, SamplingParams(temperature=1e300), LAST_U) == 2  # uniform


# ── outside oracle: transformers ─────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ours,args,theirs", [
    (s.top_k_np, k, oracle.TopKLogitsWarper(k)) for k in (1, 2, 40, 5000)] + [
    (s.top_p_np, p, oracle.TopPLogitsWarper(p)) for p in (0.001, 0.1, 0.5, 0.9, 0.9999, 1.0)] + [
    (s.min_p_np, p, oracle.MinPLogitsWarper(p)) for p in (0.001, 0.05, 0.5, 1.0)])
def test_truncations_keep_what_transformers_keeps(seed, ours, args, theirs):
    logits = random_logits(seed, scale=1.0 + 2 * seed)
    expected = theirs(None, torch.from_numpy(logits).double()[None])[0].numpy()
    np.testing.assert_array_equal(ours(logits.astype(np.float64), args), expected)


@pytest.mark.parametrize("seed", range(3))
def test_ties_keep_as_many_of_each_value_as_transformers(seed):
    logits = np.round(random_logits(seed) * 2) / 2  # a few dozen different values
    scores = torch.from_numpy(logits).double()[None]
    for top_p in (0.05, 0.3, 0.77, 0.95):
        expected = oracle.TopPLogitsWarper(top_p)(None, scores)[0].numpy()
        got = s.top_p_np(logits, top_p)
        np.testing.assert_array_equal(np.sort(got), np.sort(expected))
    expected = oracle.TopKLogitsWarper(30)(None, scores)[0].numpy()
    np.testing.assert_array_equal(s.top_k_np(logits, 30), expected)


def test_repetition_penalty_is_transformers():
    logits, ids = random_logits(8), np.random.default_rng(1).integers(0, 997, 300)
    for penalty in (0.5, 1.3):
        processor = oracle.RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.from_numpy(ids)[None], torch.from_numpy(logits).double()[None])
        got = p.penalize_repetition_np(logits, penalty, ids.tolist())
        np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-12)


def test_the_whole_distribution_is_transformers():
    logits, ids = random_logits(9), [3, 5, 5, 900]
    params = SamplingParams(repetition_penalty=1.2, temperature=0.7, min_p=0.01, top_k=50,
                            top_p=0.8)
    scores = torch.from_numpy(logits).double()[None]
    for warper in (oracle.RepetitionPenaltyLogitsProcessor(1.2),
                   oracle.TemperatureLogitsWarper(0.7), oracle.MinPLogitsWarper(0.01),
                   oracle.TopKLogitsWarper(50), oracle.TopPLogitsWarper(0.8)):
        scores = warper(torch.tensor([ids]), scores)
    got = s.probabilities_np(p.process_logits_np(logits, params, ids[:2], ids[2:], []), params)
    np.testing.assert_allclose(got, torch.softmax(scores[0], -1).numpy(), rtol=1e-12)


# ── the twins ────────────────────────────────────────────────────────────────────────────────────

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]) | st.floats(0, 10),
    top_k=st.sampled_from([0, -1]) | st.integers(1, 60),
    top_p=st.just(1.0) | st.floats(0, 1, exclude_min=True),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.1, 10),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 1), st.floats(-150, 150)),
    min_tokens=st.integers(0, 3),
)
# few different values, so that ties are common, or many
LOGITS = (st.lists(st.integers(-4, 4), min_size=2, max_size=40)
          | st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40))
U = st.sampled_from([0.0, 0.5, LAST_U]) | st.floats(0, 1, exclude_max=True)


@settings(max_examples=600, deadline=None)
@given(logits=LOGITS, params=PARAMS, u=U, data=st.data())
@pytest.mark.parametrize("device", DEVICES)
def test_twins_keep_the_same_tokens_and_draw_the_same_one(device, logits, params, u, data):
    ids = st.lists(st.integers(0, len(logits) - 1), max_size=6)
    prompt, output = data.draw(ids), data.draw(ids)
    stop = data.draw(st.lists(st.integers(1, len(logits) - 1), max_size=1))
    x_np = np.array(logits, np.float32)
    x_torch = torch.from_numpy(x_np).to(device)
    processed_np = p.process_logits_np(x_np, params, prompt, output, stop)
    processed_torch = p.process_logits_torch(x_torch, params, prompt, output, stop)
    same(processed_np, processed_torch)
    token = s.sample_np(x_np, params, u, prompt, output, stop)
    assert s.sample_torch(x_torch, params, u, prompt, output, stop) == token
    assert type(token) is int
    if not params.is_greedy:
        probs_np = s.probabilities_np(processed_np, params)
        probs_torch = s.probabilities_torch(processed_torch, params)
        same(probs_np, probs_torch)
        assert probs_np[token] > 0 and math.isclose(probs_np.sum(), 1, rel_tol=1e-12)
        assert np.array_equal(probs_np > 0, probs_torch.cpu().numpy() > 0)
        best_kept = processed_np[probs_np > 0].max()  # the best, or one equal to it in float64
        assert math.isclose(best_kept, processed_np.max(), rel_tol=1e-12, abs_tol=1e-12)
    np.testing.assert_array_equal(x_np, np.array(logits, np.float32))  # the caller's, untouched
    assert torch.equal(x_torch.cpu(), torch.from_numpy(x_np))


@settings(max_examples=300, deadline=None)
@given(logits=LOGITS, top_p=st.floats(0, 1, exclude_min=True))
@example(logits=[0] * 7, top_p=3 / 7)
@example(logits=[0, 1] * 9, top_p=5e-324)
def test_the_nucleus_is_the_smallest(logits, top_p):
    logits = np.array(logits, np.float64)
    probs = s.softmax_np(logits)
    nucleus = kept(s.top_p_np(logits, top_p))
    assert probs[nucleus].sum() >= top_p - 1e-8
    without_the_least = probs[nucleus].sum() - probs[nucleus].min()
    assert len(nucleus) == 1 or without_the_least < top_p + 1e-8
    assert probs[nucleus].min() >= np.delete(probs, nucleus).max(initial=0)
    assert kept(s.top_p_torch(torch.from_numpy(logits), top_p)) == nucleus


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_twins_at_the_size_of_a_real_vocabulary(device, dtype):
    x_torch = torch.from_numpy(random_logits(2, 49152)).to(device, dtype)
    x_np = x_torch.double().cpu().numpy()
    rng = s.request_rng(0, 0)
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9),
                   SamplingParams(temperature=0.6, top_k=50, top_p=0.95, min_p=0.01),
                   SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=9,
                                  logit_bias={49151: 5.0})):
        for _ in range(5):
            ids = rng.integers(0, 49152, 20).tolist()
            u = rng.random()
            token = s.sample_np(x_np, params, u, ids, ids[:8], [2])
            assert s.sample_torch(x_torch, params, u, ids, ids[:8], [2]) == token
        got = s.top_logprobs_torch(x_torch, token, 20)
        expected = s.top_logprobs_np(x_np, token, 20)
        assert list(got) == list(expected)
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_truncations_keep_the_dtype(dtype):
    x = torch.tensor([1.0, 3.0, 2.0], dtype=dtype)
    for y in (s.top_k_torch(x, 2), s.top_p_torch(x, 0.5), s.min_p_torch(x, 0.5)):
        assert y.dtype == dtype
    assert s.top_k_np(np.float32([1, 3, 2]), 2).dtype == np.float32


# ── the best token of many rows ──────────────────────────────────────────────────────────────────

GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize("best_tokens", [
    s.best_tokens_np, lambda logits: s.best_tokens_torch(torch.from_numpy(logits))])
def test_best_tokens_by_hand(best_tokens):
    """Of equals the lowest id; -inf rules a token out, and is no overflow."""
    logits = np.array([[1, 5, 2, 5], [-3, -4, -3, -9], [-np.inf, -np.inf, 0, -np.inf]])
    assert best_tokens(logits) == [1, 0, 2]
    assert all(type(token) is int for token in best_tokens(logits))
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="the best logit of a row is not finite"):
            best_tokens(np.array([[1, 5, 2, 5], [0, bad, 0, 0]]))
    with pytest.raises(FloatingPointError):
        best_tokens(np.full((2, 3), -np.inf))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("R", [1, 3, 8])
def test_best_tokens_are_those_that_each_row_gets_alone(device, dtype, R):
    """Coarse numbers, so that ties are common."""
    logits = np.round(np.random.default_rng(R).normal(0, 2, (R, 997)).astype("float32"), 0)
    rows = torch.from_numpy(logits).to(device, getattr(torch, dtype))
    expected = [s.sample_np(row, GREEDY, 0.5) for row in logits]
    assert s.best_tokens_np(logits) == s.best_tokens_torch(rows) == expected
    assert expected == [s.sample_torch(row, GREEDY, 0.5) for row in rows]


def test_who_takes_the_best_token():
    assert GREEDY.takes_best_token(0)
    assert not SamplingParams().takes_best_token(0)
    for changed in ({"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1},
                    {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        assert not dataclasses.replace(GREEDY, **changed).takes_best_token(9)
    params = dataclasses.replace(GREEDY, min_tokens=3)
    assert [params.takes_best_token(count) for count in range(5)] == [False] * 3 + [True] * 2
    # What cannot change the best does not matter.
    assert dataclasses.replace(GREEDY, top_k=3, top_p=0.5, min_p=0.1, seed=1).takes_best_token(0)


# ── log-probabilities ────────────────────────────────────────────────────────────────────────────

def test_top_logprobs_by_hand():
    logits = np.log([0.1, 0.4, 0.2, 0.3]) + 50  # a shift of all logits changes nothing

    def rounded(token, num):
        return {k: round(math.exp(v), 6) for k, v in s.top_logprobs_np(logits, token, num).items()}

    assert list(rounded(0, 2).items()) == [(0, 0.1), (1, 0.4), (3, 0.3)]  # num + 1 entries
    assert list(rounded(3, 2).items()) == [(3, 0.3), (1, 0.4)]  # the sampled one is among them
    assert rounded(2, 0) == {2: 0.2}
    assert len(rounded(2, 20)) == 4


def test_top_logprobs_are_torchs_log_softmax():
    logits = random_logits(6) * 30
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    best = torch.topk(expected, 20)
    for got in (s.top_logprobs_np(logits, 11, 20),
                s.top_logprobs_torch(torch.from_numpy(logits), 11, 20)):
        assert list(got) == [11, *best.indices.tolist()]
        np.testing.assert_allclose(list(got.values()), [expected[11], *best.values], rtol=1e-12)


def test_top_logprobs_of_equals_and_of_ruled_out_tokens():
    logits = np.array([0.0, 1.0, 1.0, 1.0, -np.inf, -np.inf])
    for got in (s.top_logprobs_np(logits, 0, 2),
                s.top_logprobs_torch(torch.from_numpy(logits), 0, 2)):
        assert list(got) == [0, 1, 2]
    assert list(s.top_logprobs_np(logits, 1, 20)) == [1, 2, 3, 0]
    assert list(s.top_logprobs_torch(torch.from_numpy(logits), 1, 20)) == [1, 2, 3, 0]


def test_sampling_in_numpy_does_not_import_torch():
    code = ("import sys, numpy as np; from minillm.sampling import *; "
            "p = SamplingParams(top_p=0.9, top_k=2, min_p=0.1, repetition_penalty=1.2); "
            "t = sample_np(np.ones(5, np.float32), p, 0.5, [1], [2], [3]); "
            "top_logprobs_np(np.ones(5), t, 2); print('torch._C' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

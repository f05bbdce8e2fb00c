"""Grader of chapter 01_first_token. README.md in this folder tells how graders are written."""

from __future__ import annotations

import numpy as np

from minillm import SamplingParams
from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import check, close, equal, require
from minillm.generate import generate, prefill
from minillm.loading.checkpoint import Checkpoint
from minillm.metrics import RequestMetrics
from minillm.model_runner import NumpyRunner
from minillm.request import Request
from minillm.tokenizer import Tokenizer

ABSOLUTE = "the clock does not start at 0 when a request comes: subtract submitted_s"
SECONDS = "that is in seconds: a second has 1000 milliseconds"
NO_GAP = ("the wait for the first token is the TTFT, no gap between tokens: n tokens have n − 1 "
          "gaps")
NO_TOKEN = "a request can be broken off before its first token: nothing was measured, so None"
NOT_NONE = "0 ms is a time that was measured; None is for what was not: ask for `is None`, or len"


def milliseconds(submitted_s, token_times_s):
    """Oracle: how long after submission each token came, in a loop over plain numbers."""
    return [1000.0 * (float(time_s) - float(submitted_s)) for time_s in token_times_s]


def gaps(since_ms):
    """Oracle of ITL."""
    out = []
    for i in range(1, len(since_ms)):
        out.append(since_ms[i] - since_ms[i - 1])
    return out


def measured(metrics):
    """What the student's function returned, if it is what was asked for."""
    require(isinstance(metrics, RequestMetrics), "a RequestMetrics", repr(metrics)[:80],
            "the function returns nothing: is a `return` missing?" if metrics is None else
            "return RequestMetrics(...), imported at the top of the starter")
    return metrics


def number(got, expected, mistakes=None, tolerance=1e-6):
    """A duration that is there."""
    require(got is not None, f"{expected:.6g}", "None", NOT_NONE)
    close(got, expected, tolerance, mistakes=mistakes)


# Four tokens on a clock that has been running for a while; no two of the numbers are equal.
SUBMITTED_S, TIMES_S = 50.0, [50.25, 50.375, 50.5625, 51.125]
SINCE_MS = milliseconds(SUBMITTED_S, TIMES_S)
NUM = len(TIMES_S)


@check("TTFT: from submission to the first token, in milliseconds")
def ttft(request_metrics):
    metrics = measured(request_metrics(SUBMITTED_S, TIMES_S))
    number(metrics.ttft_ms, SINCE_MS[0], {
        SECONDS: SINCE_MS[0] / 1000,
        ABSOLUTE: 1000 * TIMES_S[0],
        "that is the time of the last token, not of the first": SINCE_MS[-1],
    })


@check("E2E: from submission to the last token")
def e2e(request_metrics):
    metrics = measured(request_metrics(SUBMITTED_S, TIMES_S))
    number(metrics.e2e_ms, SINCE_MS[-1], {
        SECONDS: SINCE_MS[-1] / 1000,
        ABSOLUTE: 1000 * TIMES_S[-1],
        "E2E starts at submission, not at the first token": SINCE_MS[-1] - SINCE_MS[0],
    })


@check("ITL: the gap before each token after the first", hint=NO_GAP)
def itl(request_metrics):
    got, expected = measured(request_metrics(SUBMITTED_S, TIMES_S)).itl_ms, gaps(SINCE_MS)
    require(isinstance(got, (list, tuple)), "a list", f"a {type(got).__name__}",
            "itl_ms is a list of numbers, which can be written as JSON: .tolist() makes one")
    close(got, expected, hint=NO_GAP, mistakes={
        SECONDS: [gap / 1000 for gap in expected],
        "the gaps are negative: subtract the sooner from the later": [-gap for gap in expected],
        "those are times since submission, not gaps between neighbours": SINCE_MS[1:],
        "those are times since the first token, not gaps between neighbours":
            [since - SINCE_MS[0] for since in SINCE_MS[1:]],
        "the gap before the first token is in, and the last gap is not":
            [SINCE_MS[0], *expected[:-1]],
    })


@check("TPOT: (E2E − TTFT) / (tokens − 1)")
def tpot(request_metrics):
    metrics = measured(request_metrics(SUBMITTED_S, TIMES_S))
    after_first = SINCE_MS[-1] - SINCE_MS[0]
    middle = sorted(gaps(SINCE_MS))[1]
    number(metrics.tpot_ms, after_first / (NUM - 1), {
        SECONDS: after_first / (NUM - 1) / 1000,
        "the TTFT is in it: TPOT is about the tokens after the first": SINCE_MS[-1] / NUM,
        "the TTFT is in it, and is divided among the tokens after it": SINCE_MS[-1] / (NUM - 1),
        "divided by all tokens, but the first has no gap before it: n − 1": after_first / NUM,
        "not divided by the number of gaps": after_first,
        "that is the median of the gaps; TPOT is their mean": middle,
        "that is a rate, tokens a second; TPOT is the time of one": 1000 * (NUM - 1) / after_first,
    })


@check("the numbers of tokens are in it", hint="num_output_tokens counts the times")
def counts(request_metrics):
    metrics = measured(request_metrics(SUBMITTED_S, TIMES_S, 7, 3))
    equal(metrics.num_output_tokens, NUM, mistakes={
        "that is the number of gaps, one less than tokens": NUM - 1,
        "the prompt is counted too": NUM + 7})
    equal(metrics.num_prompt_tokens, 7, hint="passed on as it is given", mistakes={
        "the cached tokens are part of the prompt: take nothing away": 4,
        "prompt and cached tokens are mixed up": 3})
    equal(metrics.num_cached_tokens, 3, hint="passed on as it is given")


@check("one token: there is no gap, and so no TPOT")
def one_token(request_metrics):
    metrics = measured(request_metrics(2.0, [2.25]))
    number(metrics.ttft_ms, 250.0)
    number(metrics.e2e_ms, 250.0)
    equal(list(metrics.itl_ms), [], hint=NO_GAP)
    equal(metrics.tpot_ms, None, mistakes={
        "0 ms a token would be infinitely fast; nothing was measured, so None": 0.0,
        "the TTFT is in it: TPOT is about the tokens after the first": 250.0})


@check("no token: nothing was measured", hint=NO_TOKEN)
def no_token(request_metrics):
    metrics = measured(request_metrics(2.0, [], 7))
    equal([metrics.num_prompt_tokens, metrics.num_output_tokens], [7, 0])
    equal([metrics.ttft_ms, metrics.tpot_ms, metrics.e2e_ms], [None] * 3, hint=NO_TOKEN)
    equal(list(metrics.itl_ms), [], hint="no token, no gap")


@check("0 ms is a time, and not None", hint=NOT_NONE)
def still_clock(request_metrics):
    metrics = measured(request_metrics(0.0, [0.0, 0.0]))
    for got in (metrics.ttft_ms, metrics.tpot_ms, metrics.e2e_ms):
        number(got, 0.0)


@check("the engine measures with it: an answer's metrics are yours")
def in_the_engine(request_metrics):
    clocks = []

    def noted(submitted_s, token_times_s, *counts, **named_counts):
        clocks.append((submitted_s, list(token_times_s)))
        return request_metrics(submitted_s, token_times_s, *counts, **named_counts)

    runner, tokenizer = NumpyRunner(RandomCheckpoint()), Tokenizer.train("", 256)
    request = Request(tokenizer.encode("Once upon"),
                      SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), ())
    cache = runner.new_cache(16)
    prefill(runner, request.prompt_token_ids[:5], cache)  # five tokens are there already
    with using(request_metrics=noted):
        for _ in generate(runner, tokenizer, request, cache):
            pass
    metrics = measured(request.output.metrics)
    since_ms = milliseconds(*clocks[0])
    equal([metrics.num_prompt_tokens, metrics.num_cached_tokens, metrics.num_output_tokens],
          [9, 5, 4], hint="the engine gives the counts by position: prompt, then cached")
    # Seconds since a machine was switched on are large, so their differences are rounded.
    number(metrics.ttft_ms, since_ms[0], tolerance=1e-3)
    number(metrics.tpot_ms, (since_ms[-1] - since_ms[0]) / 3, tolerance=1e-3)
    close([metrics.ttft_ms + sum(metrics.itl_ms)], [since_ms[-1]], 1e-3, hint=(
        "the parts add up: TTFT and all gaps are E2E"))


class RandomCheckpoint(Checkpoint):
    """A tiny model of random numbers: its answers mean nothing, and take as many steps."""

    config = ModelConfig(vocab_size=256, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, head_dim=4)
    rope_freq_factors = None

    def __init__(self):
        self.rng = np.random.default_rng(1)

    def tensor(self, name, shape):
        return self.rng.normal(size=shape).astype(np.float32)

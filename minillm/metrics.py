"""How is the speed of an answer measured, and that of many?

The definitions are those of `vllm bench serve`, AIPerf and MLPerf Inference. Chapter
01_first_token tells the story of one request; many of them, their percentiles and their goodput,
are the subject of 10_continuous_batching.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .exercise import exercise

PERCENTS = (50, 95, 99)


@dataclass(frozen=True)
class RequestMetrics:
    """What one request experienced; all durations in milliseconds.

    ttft_ms: from submission to the first token; None if none came.
    itl_ms: inter-token latencies, the gap before each token after the first.
    tpot_ms: time per output token after the first, (e2e − ttft) / (tokens − 1); None for one token.
    e2e_ms: from submission to the last token.
    num_cached_tokens: prompt tokens whose keys and values were there already.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_ms: float | None
    itl_ms: list[float]
    tpot_ms: float | None
    e2e_ms: float | None

    @property
    def decode_tokens_per_s(self):
        """Speed of the tokens after the first; None for fewer than two."""
        return 1000 / self.tpot_ms if self.tpot_ms else None


@exercise("01_first_token")
def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    """Metrics of one request from its clock: when it was submitted, and when each token came.

    submitted_s: seconds; token_times_s: a list of seconds on the same clock, one a token, in order.
    The clock starts anywhere, so only differences mean something. Returns RequestMetrics(
    num_prompt_tokens, num_cached_tokens, num_output_tokens, ttft_ms, itl_ms, tpot_ms, e2e_ms):
    the first two as they are given, the tokens that came, and durations in milliseconds.

        ttft_ms   from submission to the first token; None if none came
        itl_ms    a list: the gap before each token after the first; [] for fewer than two tokens
        tpot_ms   (e2e_ms − ttft_ms) / (tokens − 1); None for fewer than two tokens
        e2e_ms    from submission to the last token; None if none came

    >>> m = request_metrics(10.0, [10.5, 10.6, 10.9])
    >>> [round(ms) for ms in (m.ttft_ms, *m.itl_ms, m.tpot_ms, m.e2e_ms)]
    [500, 100, 300, 200, 900]
    """
    since_ms = [1000 * (time_s - submitted_s) for time_s in token_times_s]
    gaps_ms = [later - sooner for sooner, later in zip(since_ms, since_ms[1:])]
    return RequestMetrics(
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=len(since_ms),
        ttft_ms=since_ms[0] if since_ms else None,
        itl_ms=gaps_ms,
        tpot_ms=(since_ms[-1] - since_ms[0]) / len(gaps_ms) if gaps_ms else None,
        e2e_ms=since_ms[-1] if since_ms else None,
    )


@dataclass(frozen=True)
class Throughput:
    """What a server got done in a span of time; every rate is per second of it."""

    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


def throughput(requests, duration_s):
    """Of finished requests, a list of RequestMetrics;  -> Throughput. A total counts prompts too,
    cached or not.   duration_s: from the first submission to the last token."""
    num_prompt = sum(each.num_prompt_tokens for each in requests)
    num_output = sum(each.num_output_tokens for each in requests)
    return Throughput(len(requests) / duration_s, num_output / duration_s,
                      (num_prompt + num_output) / duration_s)


def percentiles(values, percents=PERCENTS):
    """{50: the median, 95: what 95 of 100 values do not exceed, ...}, interpolated as np.percentile
    does. None stands for a request that has no such value, and is left out; nothing is left of an
    empty list.

    >>> percentiles([10.0, None, 20.0, 30.0], (50, 95))
    {50: 20.0, 95: 29.0}
    """
    known = [value for value in values if value is not None]
    return {percent: float(np.percentile(known, percent)) for percent in percents if known}


def goodput(requests, duration_s, max_ttft_ms, max_tpot_ms):
    """Requests/s that met every objective, TTFT <= max_ttft_ms and TPOT <= max_tpot_ms. (Zhong et
    al. 2024, "DistServe", §2.) A request of one token has no TPOT to miss; one without any token
    has missed its first.

    requests: a list of RequestMetrics   duration_s: as in `throughput`

    >>> quick, slow = request_metrics(0.0, [0.1, 0.2]), request_metrics(0.0, [0.1, 0.9])
    >>> goodput([quick, slow], 2.0, max_ttft_ms=200, max_tpot_ms=500)
    0.5
    """
    num_good = sum(each.ttft_ms is not None and each.ttft_ms <= max_ttft_ms
                   and (each.tpot_ms is None or each.tpot_ms <= max_tpot_ms) for each in requests)
    return num_good / duration_s

"""the wait for the first token is the TTFT, no gap between tokens"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    times_s = [submitted_s, *token_times_s]
    gaps_ms = [1000 * (later - sooner) for sooner, later in zip(times_s, times_s[1:])]
    num_gaps = len(gaps_ms) - 1
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(gaps_ms), gaps_ms[0] if gaps_ms else None,
        gaps_ms, sum(gaps_ms[1:]) / num_gaps if num_gaps > 0 else None,
        sum(gaps_ms) if gaps_ms else None)

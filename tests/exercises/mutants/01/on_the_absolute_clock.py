"""the clock does not start at 0 when a request comes"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    times_ms = [1000 * time_s for time_s in token_times_s]
    gaps_ms = [later - sooner for sooner, later in zip(times_ms, times_ms[1:])]
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(times_ms), times_ms[0] if times_ms else None,
        gaps_ms, sum(gaps_ms) / len(gaps_ms) if gaps_ms else None,
        times_ms[-1] if times_ms else None)

"""a request can be broken off before its first token"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    since_ms = [1000 * (time_s - submitted_s) for time_s in token_times_s]
    gaps_ms = [later - sooner for sooner, later in zip(since_ms, since_ms[1:])]
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(since_ms), since_ms[0], gaps_ms,
        sum(gaps_ms) / len(gaps_ms) if gaps_ms else None, since_ms[-1])

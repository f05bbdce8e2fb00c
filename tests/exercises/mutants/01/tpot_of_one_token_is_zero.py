"""0 ms a token would be infinitely fast"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    since_ms = [1000 * (time_s - submitted_s) for time_s in token_times_s]
    gaps_ms = [later - sooner for sooner, later in zip(since_ms, since_ms[1:])]
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(since_ms), since_ms[0] if since_ms else None,
        gaps_ms, sum(gaps_ms) / max(1, len(gaps_ms)) if since_ms else None,
        since_ms[-1] if since_ms else None)

"""that is in seconds"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    since = [time_s - submitted_s for time_s in token_times_s]
    gaps = [later - sooner for sooner, later in zip(since, since[1:])]
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(since), since[0] if since else None, gaps,
        sum(gaps) / len(gaps) if gaps else None, since[-1] if since else None)

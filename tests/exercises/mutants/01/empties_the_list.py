"""input `token_times_s` is changed"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    num_output_tokens, itl_ms, ttft_ms, e2e_ms = len(token_times_s), [], None, None
    if token_times_s:
        before_s = token_times_s.pop(0)
        ttft_ms = e2e_ms = 1000 * (before_s - submitted_s)
    while token_times_s:
        time_s = token_times_s.pop(0)
        itl_ms.append(1000 * (time_s - before_s))
        before_s, e2e_ms = time_s, 1000 * (time_s - submitted_s)
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, num_output_tokens, ttft_ms, itl_ms,
        sum(itl_ms) / len(itl_ms) if itl_ms else None, e2e_ms)

"""One pass over the times, as a client would that hears one token after the other."""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    ttft_ms = tpot_ms = e2e_ms = first_s = last_s = None
    itl_ms = []
    for time_s in token_times_s:
        e2e_ms = 1e3 * time_s - 1e3 * submitted_s
        if first_s is None:
            first_s, ttft_ms = time_s, e2e_ms
        else:
            itl_ms.append((time_s - last_s) / 1e-3)
            tpot_ms = 1e3 * (time_s - first_s) / len(itl_ms)
        last_s = time_s
    return RequestMetrics(
        ttft_ms=ttft_ms, itl_ms=itl_ms, tpot_ms=tpot_ms, e2e_ms=e2e_ms,
        num_output_tokens=len(token_times_s), num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens)

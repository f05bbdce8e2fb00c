"""Differences of an array that begins with the submission: the first is TTFT, the rest ITL."""

from __future__ import annotations

import numpy as np

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    ttft_ms, *itl_ms = np.diff([submitted_s, *token_times_s]) * 1000 if token_times_s else [None]
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(token_times_s), ttft_ms, itl_ms,
        float(np.mean(itl_ms)) if itl_ms else None,
        ttft_ms + sum(itl_ms) if token_times_s else None)

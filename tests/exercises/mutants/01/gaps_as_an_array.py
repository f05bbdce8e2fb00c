""".tolist() makes one"""

from __future__ import annotations

import numpy as np

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    since_ms = 1000 * (np.array(token_times_s) - submitted_s)
    gaps_ms = np.diff(since_ms)
    return RequestMetrics(
        num_prompt_tokens, num_cached_tokens, len(since_ms), since_ms[0] if len(since_ms) else None,
        gaps_ms, gaps_ms.mean() if len(gaps_ms) else None, since_ms[-1] if len(since_ms) else None)

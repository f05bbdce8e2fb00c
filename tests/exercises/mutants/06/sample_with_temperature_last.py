"""the temperature comes after the truncations"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from minillm.penalties import process_logits_np
from minillm.sampling import draw_np, probabilities_np


def sample_np(logits, params, u, prompt_token_ids=(), output_token_ids=(), stop_token_ids=()):
    logits = process_logits_np(logits, params, prompt_token_ids, output_token_ids, stop_token_ids)
    if not np.isfinite(logits.max()):
        raise FloatingPointError("no finite logit is the best")
    if params.is_greedy:
        return int(logits.argmax())
    probs = probabilities_np(logits, replace(params, temperature=1.0))
    probs = np.where(probs > 0, probs ** (1 / params.temperature), 0)
    return draw_np(probs / probs.sum(), u)

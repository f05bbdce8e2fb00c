"""one logit is nan: raise FloatingPointError"""

from __future__ import annotations

from minillm.penalties import process_logits_np
from minillm.sampling import draw_np, probabilities_np


def sample_np(logits, params, u, prompt_token_ids=(), output_token_ids=(), stop_token_ids=()):
    logits = process_logits_np(logits, params, prompt_token_ids, output_token_ids, stop_token_ids)
    if params.is_greedy:
        return int(logits.argmax())
    return draw_np(probabilities_np(logits, params), u)

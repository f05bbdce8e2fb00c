"""penalties are left out where a token is drawn"""

from __future__ import annotations

import numpy as np

from minillm.penalties import process_logits_np
from minillm.sampling import draw_np, probabilities_np


def sample_np(logits, params, u, prompt_token_ids=(), output_token_ids=(), stop_token_ids=()):
    if not np.isfinite(logits.max()):
        raise FloatingPointError("no finite logit is the best")
    if params.is_greedy:
        return int(process_logits_np(logits, params, prompt_token_ids, output_token_ids,
                                     stop_token_ids).argmax())
    return draw_np(probabilities_np(logits, params), u)

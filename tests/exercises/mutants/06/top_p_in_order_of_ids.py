"""what was decided in order of size is applied in order of ids"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def top_p_np(logits, top_p):
    probs = np.sort(softmax_np(logits))[::-1]
    kept = np.cumsum(probs) - probs < top_p
    return np.where(kept, logits, -np.inf)

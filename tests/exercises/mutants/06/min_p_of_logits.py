"""logits are compared, not probabilities"""

from __future__ import annotations

import numpy as np


def min_p_np(logits, min_p):
    return np.where(logits >= min_p * logits.max(), logits, -np.inf)

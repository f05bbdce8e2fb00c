"""How should a weight be rounded when its neighbours are still to come?

So that they can make up for the error. Rounding to nearest minimises the error of each weight;
what counts is the error of the products, ||X·Wᵀ − X·Qᵀ||², with X the activations that the matrix
meets. There the errors of two columns that are active together can cancel. GPTQ rounds one column
after the other, and moves what each lost into the columns that are not rounded yet: how much into
which is in the inverse of H = Xᵀ·X              (Frantar et al. 2022, "GPTQ", §3 and algorithm 1).

Three choices belong to this form. Columns are rounded in the order of their activations' energy,
the largest first, while many are left to make up for them ("act-order" in the authors' code). The
scale and the minimum of every group are fixed before that, from the weights as they were ("static
groups"): so a column stays in its group, and the result is read like any other Int4. And a group's
range may be narrower than its weights, where that costs less: that is not in the paper.

Chapter 11_quantization tells the story. `calibration.py` collects H. Left out: other numbers of
bits, and a target that takes the errors of the layers before into account.
"""

from __future__ import annotations

import lazy_loader as lazy
import numpy as np

from .quantization import (
    check_group_size,
    dequantize_group_np,
    dequantize_group_torch,
    quantize_group_np,
    quantize_group_torch,
    split_groups_np,
    split_groups_torch,
)

torch = lazy.load("torch")

DAMPING = 0.01  # of H's mean diagonal, added to it: §3.3, "Cholesky reformulation"
BLOCK_SIZE = 64  # columns whose errors reach the columns behind them in one product
SHRINKAGES = [1 - 0.05 * step for step in range(1, 9)]  # of a group's range: 0.95 … 0.6


def gptq_np(weight, hessian, group_size, symmetric=False):
    """Quantize a matrix to 4 bits so that its products, not its entries, change little.

    weight: [R, C] float, hessian: Xᵀ·X [C, C] of the activations X [N, C] it meets, times any
    factor  ->  q [R, C] uint8, scale and minimum [R, ⌈C/group_size⌉] float32, to be read as those
    of quantize_group_np. With a diagonal H there is nothing to make up for, and q is the nearest.
    A channel that was never active (a 0 on H's diagonal) is rounded to nearest as well.
    Raises ValueError if group_size < 1, or if H is not [C, C].
    Cost: O(C³ + R·C²), in C steps.

    Two activations that are nearly always equal: the 0.4 that the first weight loses, the second
    gets. (The last two columns are there to set the group's range: they make a step 1.)

    >>> weight, both = np.array([[1.4, 1.3, 15.0, 0.0]]), np.diag([1.01, 1.0, 1.0, 1.0])
    >>> both[0, 1] = both[1, 0] = 1.0
    >>> gptq_np(weight, both, 4)[0].tolist(), quantize_group_np(weight, 4)[0].tolist()
    ([[1, 2, 15, 0]], [[1, 1, 15, 0]])
    """
    check_arguments(weight, hessian, group_size)
    scale, minimum = choose_scales_np(weight, hessian, group_size, symmetric)
    factor, order = compensation_np(hessian)
    groups = order // group_size
    columns = weight.T[order].astype(np.float32)  # [C, R]: a column of the matrix is a row here
    C, q = len(columns), np.zeros(columns.shape, dtype=np.uint8)
    for start in range(0, C, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, C)
        errors = np.zeros_like(columns[start:stop])
        for i in range(start, stop):
            steps, low = scale[:, groups[i]], minimum[:, groups[i]]  # [R]
            nearest = np.round((columns[i] - low) / steps).clip(0, 15)
            q[order[i]] = nearest.astype(np.uint8)
            error = (columns[i] - (nearest * steps + low)) / factor[i, i]
            columns[i:stop] -= factor[i, i:stop, None] * error
            errors[i - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors  # what the block lost, at once
    return q.T.copy(), scale, minimum


def gptq_torch(weight, hessian, group_size, symmetric=False):
    """Same contract as gptq_np."""
    check_arguments(weight, hessian, group_size)
    scale, minimum = choose_scales_torch(weight, hessian, group_size, symmetric)
    factor, order = compensation_torch(hessian)
    groups = order // group_size
    columns = weight.T[order].to(torch.float32)
    C, q = len(columns), torch.zeros(columns.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, C, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, C)
        errors = torch.zeros_like(columns[start:stop])
        for i in range(start, stop):
            steps, low = scale[:, groups[i]], minimum[:, groups[i]]
            nearest = torch.round((columns[i] - low) / steps).clip(0, 15)
            q[order[i]] = nearest.to(torch.uint8)
            error = (columns[i] - (nearest * steps + low)) / factor[i, i]
            columns[i:stop] -= factor[i, i:stop, None] * error
            errors[i - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    return q.T.contiguous(), scale, minimum


def compensation_np(hessian):
    """How much of a column's error goes into the columns after it, and the order of the columns.

    hessian: [C, C]  ->  factor [C, C] float32, upper triangular, in the order that is returned;
    order [C] int, most active column first. When column i of that order has lost e, column j gets
    back e·factor[i, j] / factor[i, i].

    The factor is the Cholesky factor of H⁻¹ (§3.3): its row i is what the inverse has for column i
    once the columns before it are gone, so that nothing is inverted again at every step.
    """
    wide = hessian.astype(np.float64)
    energy = np.diagonal(wide)
    dampings = np.where(energy > 0, DAMPING * energy.mean(), np.ones_like(energy))
    order = np.argsort(-energy, kind="stable")
    damped = (wide + np.diag(dampings))[order][:, order]
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor.astype(np.float32), order


def compensation_torch(hessian):
    """Same contract as compensation_np."""
    wide = hessian.to(torch.float64)
    energy = torch.diagonal(wide)
    dampings = torch.where(energy > 0, DAMPING * energy.mean(), torch.ones_like(energy))
    order = torch.argsort(-energy, stable=True)
    damped = (wide + torch.diag(dampings))[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(damped)).T
    return factor.to(torch.float32), order


def choose_scales_np(weight, hessian, group_size, symmetric=False):
    """A scale and a minimum for every group, from a range that may be narrower than the group's.

    A narrower range costs the largest weights of a group and is finer for all the others. Of the
    SHRINKAGES of a group's range the one with the smallest  Σ H_jj·(W_j − value_j)²  is taken: an
    error counts as much as the activations it meets.

    weight: [R, C], hessian: [C, C]  ->  scale, minimum [R, ⌈C/group_size⌉], as of quantize_group_np
    """
    wide = weight.astype(np.float32)
    energy = np.diagonal(hessian).astype(np.float32)
    groups = split_groups_np(wide, group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    best, *chosen = quantize_error_np(wide, energy, low, high, group_size, symmetric)
    for shrinkage in SHRINKAGES:
        error, *tried = quantize_error_np(wide, energy, shrinkage * low, shrinkage * high,
                                          group_size, symmetric)
        chosen = [np.where(error < best, new, old) for new, old in zip(tried, chosen)]
        best = np.minimum(error, best)
    return chosen


def choose_scales_torch(weight, hessian, group_size, symmetric=False):
    """Same contract as choose_scales_np."""
    wide = weight.to(torch.float32)
    energy = torch.diagonal(hessian).to(torch.float32)
    groups = split_groups_torch(wide, group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    best, *chosen = quantize_error_torch(wide, energy, low, high, group_size, symmetric)
    for shrinkage in SHRINKAGES:
        error, *tried = quantize_error_torch(wide, energy, shrinkage * low, shrinkage * high,
                                             group_size, symmetric)
        chosen = [torch.where(error < best, new, old) for new, old in zip(tried, chosen)]
        best = torch.minimum(error, best)
    return chosen


def quantize_error_np(weight, energy, low, high, group_size, symmetric):
    """What rounding to nearest costs when each group's numbers are first clipped to low … high.

    weight: [R, C], energy: [C], low and high: [R, groups]  ->  error, scale, minimum [R, groups].
    A short last group counts its last column several times: that only weighs ranges against
    each other.
    """
    groups = split_groups_np(weight, group_size)
    clipped = groups.clip(low[:, :, None], high[:, :, None]).reshape(len(weight), -1)
    q, scale, minimum = quantize_group_np(clipped[:, : len(energy)], group_size, symmetric)
    lost = dequantize_group_np(q, scale, minimum, group_size) - weight
    error = split_groups_np(energy * lost**2, group_size).sum(axis=2)
    return error, scale, minimum


def quantize_error_torch(weight, energy, low, high, group_size, symmetric):
    """Same contract as quantize_error_np."""
    groups = split_groups_torch(weight, group_size)
    clipped = groups.clip(low[:, :, None], high[:, :, None]).reshape(len(weight), -1)
    q, scale, minimum = quantize_group_torch(clipped[:, : len(energy)], group_size, symmetric)
    lost = dequantize_group_torch(q, scale, minimum, group_size) - weight
    error = split_groups_torch(energy * lost**2, group_size).sum(dim=2)
    return error, scale, minimum


def check_arguments(weight, hessian, group_size):
    check_group_size(group_size)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"hessian has shape {tuple(hessian.shape)}, must be a row and a column "
                         f"for each of the {weight.shape[1]} columns of weight")

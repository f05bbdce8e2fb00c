"""How does a token look at those before it?

Three forms, one result. `attention_*` states it, and builds a score for every pair of a query and
a key. `online_softmax_attention_*` never holds more than one block of scores, so that memory does
not grow with the length of the context. `attention_sdpa` calls PyTorch's fused kernel, which is
the online form in one pass through the cache. Chapter 04_attention tells the story.
`masked_attention_*` is the first form for a batch of sequences; that is chapter 08_batching's.

Shapes: q [H, T, D], k and v [K, S, D]. The T queries are the last T of the S positions, and a
query sees the keys up to its own position. H / K query heads share one key/value head: they are
laid out as extra rows, [K, H/K·T, D], so that its keys are read once for all of them.
"""

from __future__ import annotations

import math

import lazy_loader as lazy
import numpy as np

from .exercise import exercise

torch = lazy.load("torch")


@exercise("04_attention")
def attention_np(q, k, v):
    """Scaled dot-product attention with grouped heads and a causal mask.

        softmax(q·kᵀ / √D)·v            (Vaswani et al. 2017, §3.2.1; GQA: Ainslie et al. 2023)

    q: [H, T, D]   k, v: [K, S, D]   ->   [H, T, D], in q's dtype
    Query head h reads key/value head h // (H/K). The T queries are the last of the S positions:
    query t stands at position S − T + t, and sees the keys up to that position, its own included.
    Cost: 4·H·T·S·D FLOPs, and H·T·S scores in memory.
    Raises ValueError if H is no multiple of K; check_shapes(q, k, v) does that.
    """
    (H, T, D), (K, S, _) = q.shape, k.shape
    check_shapes(q, k, v)
    grouped = q.reshape(K, H // K * T, D) / math.sqrt(D)  # before the sum: float16 overflows
    scores = grouped @ k.swapaxes(1, 2)  # [K, H/K·T, S]
    visible = np.arange(S) <= np.arange(S - T, S)[:, None]  # [T, S]
    scores = np.where(visible, scores.reshape(K, H // K, T, S), -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = probs / probs.sum(axis=-1, keepdims=True)
    out = probs.reshape(K, H // K * T, S) @ v  # [K, H/K·T, D]
    return out.reshape(H, T, D)


def attention_torch(q, k, v):
    """Same contract as attention_np."""
    (H, T, D), (K, S, _) = q.shape, k.shape
    check_shapes(q, k, v)
    grouped = q.reshape(K, H // K * T, D) / math.sqrt(D)
    scores = grouped @ k.swapaxes(1, 2)
    visible = torch.arange(S, device=q.device) <= torch.arange(S - T, S, device=q.device)[:, None]
    scores = torch.where(visible, scores.reshape(K, H // K, T, S), -math.inf)
    probs = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    probs = probs / probs.sum(dim=-1, keepdim=True)
    out = probs.reshape(K, H // K * T, S) @ v
    return out.reshape(H, T, D)


@exercise("04_attention")
def online_softmax_attention_np(q, k, v, block_size=256):
    """attention_np without the score matrix: one block of keys at a time.

    Softmax needs the largest score before the first exponential. It can do without: keep the
    largest seen so far, and when a larger one comes, shrink what was added up under the old one
    by exp(old − new).      (Milakov and Gimelshein 2018, alg. 3; FlashAttention, Dao et al. 2022)

    Same shapes, dtype and result as attention_np; H·T·block_size scores in memory, not H·T·S.
    block_size need not divide S, and may be larger.
    """
    (H, T, D), (K, S, _) = q.shape, k.shape
    check_shapes(q, k, v)
    grouped = q.reshape(K, H // K * T, D) / math.sqrt(D)
    position = np.tile(np.arange(S - T, S), H // K)[:, None]  # [H/K·T, 1], of each query row
    largest = np.full((K, H // K * T, 1), -np.inf, dtype=q.dtype)
    total = np.zeros((K, H // K * T, 1), dtype=q.dtype)  # sum of exp(score − largest)
    out = np.zeros((K, H // K * T, D), dtype=q.dtype)  # the same sum, weighted by the values
    for start in range(0, S, block_size):
        end = min(start + block_size, S)
        scores = grouped @ k[:, start:end].swapaxes(1, 2)  # [K, H/K·T, block]
        key = np.arange(start, end)
        scores = np.where(key <= position, scores, -np.inf)
        # Key 0 is visible to every query, so `new` is finite from the first block on.
        new = np.maximum(largest, scores.max(axis=-1, keepdims=True))
        probs = np.exp(scores - new)
        shrink = np.exp(largest - new)
        total = total * shrink + probs.sum(axis=-1, keepdims=True)
        out = out * shrink + probs @ v[:, start:end]
        largest = new
    return (out / total).reshape(H, T, D)


def online_softmax_attention_torch(q, k, v, block_size=256):
    """Same contract as online_softmax_attention_np."""
    (H, T, D), (K, S, _) = q.shape, k.shape
    check_shapes(q, k, v)
    grouped = q.reshape(K, H // K * T, D) / math.sqrt(D)
    position = torch.arange(S - T, S, device=q.device).repeat(H // K)[:, None]
    largest = torch.full((K, H // K * T, 1), -math.inf, dtype=q.dtype, device=q.device)
    total = torch.zeros((K, H // K * T, 1), dtype=q.dtype, device=q.device)
    out = torch.zeros((K, H // K * T, D), dtype=q.dtype, device=q.device)
    for start in range(0, S, block_size):
        end = min(start + block_size, S)
        scores = grouped @ k[:, start:end].swapaxes(1, 2)
        key = torch.arange(start, end, device=q.device)
        scores = torch.where(key <= position, scores, -math.inf)
        new = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        probs = torch.exp(scores - new)
        shrink = torch.exp(largest - new)
        total = total * shrink + probs.sum(dim=-1, keepdim=True)
        out = out * shrink + probs @ v[:, start:end]
        largest = new
    return (out / total).reshape(H, T, D)


def attention_sdpa(q, k, v):
    """attention_torch through PyTorch's fused kernel: faster, since scores stay in registers.

    One new token needs no mask, and its H/K grouped heads can pose as H/K queries of one head:
    left to itself, the kernel would copy every key H/K times first.
    """
    (H, T, D), (K, S, _) = q.shape, k.shape
    check_shapes(q, k, v)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if T == 1:
        return sdpa(q.reshape(1, K, H // K, D), k[None], v[None]).reshape(H, T, D)
    if T == S:
        return sdpa(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    # is_causal aligns the first query with the first key; here the last ones belong together.
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return sdpa(q[None], k[None], v[None], attn_mask=visible, enable_gqa=True)[0]


@exercise("08_batching", order=2)
def masked_attention_np(q, k, v, visible):
    """attention_np for a batch whose sequences differ in length: a mask says who sees what.

    q: [B, H, T, D]   k, v: [B, K, S, D]   visible: [B, T, S] bool   ->   [B, H, T, D], in q's dtype
    Query t of sequence b sees key s where visible[b, t, s]; every query must see at least one.
    Query head h reads key/value head h // (H/K), and scores are divided by √D, as in attention_np.
    A key that nobody sees, padding or a place not written yet, costs as much as any other.
    Cost: 4·B·H·T·S·D FLOPs, whatever is visible.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    grouped = q.reshape(B, K, H // K * T, D) / math.sqrt(D)
    scores = grouped @ k.swapaxes(2, 3)  # [B, K, H/K·T, S]
    scores = np.where(visible[:, None, None], scores.reshape(B, K, H // K, T, S), -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = probs / probs.sum(axis=-1, keepdims=True)
    out = probs.reshape(B, K, H // K * T, S) @ v  # [B, K, H/K·T, D]
    return out.reshape(B, H, T, D)


def masked_attention_torch(q, k, v, visible):
    """Same contract as masked_attention_np."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    grouped = q.reshape(B, K, H // K * T, D) / math.sqrt(D)
    scores = grouped @ k.swapaxes(2, 3)
    scores = torch.where(visible[:, None, None], scores.reshape(B, K, H // K, T, S), -math.inf)
    probs = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    probs = probs / probs.sum(dim=-1, keepdim=True)
    out = probs.reshape(B, K, H // K * T, S) @ v
    return out.reshape(B, H, T, D)


def masked_attention_sdpa(q, k, v, visible):
    """masked_attention_torch through PyTorch's fused kernel; see attention_sdpa."""
    (B, H, T, D), (_, K, _, _) = q.shape, k.shape
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if T == 1:
        return sdpa(q.reshape(B, K, H // K, D), k, v, attn_mask=visible[:, None]).reshape(q.shape)
    return sdpa(q, k, v, attn_mask=visible[:, None], enable_gqa=True)


def check_shapes(q, k, v):
    """Broadcasting would make an answer of some wrong shapes."""
    (H, T, D), (K, S, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key/value heads: {H} % {K} is not 0")
    if T > S:
        raise ValueError(f"{T} queries are the last of only {S} positions: T must be at most S")
    if k.shape != v.shape or D != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be "
                         "[H, T, D], [K, S, D] and [K, S, D]")

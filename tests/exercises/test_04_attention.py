"""Grader of chapter 04_attention. README.md in this folder tells how graders are written."""

from __future__ import annotations

import math

import numpy as np

from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import check, close, peak_bytes, raises, require
from minillm.kv_cache import KVCache
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np

OVERFLOW = "subtract the largest score before exp: softmax does not change, and exp cannot overflow"
IN_FLOAT64 = ("np.zeros and np.full make float64 unless they are given dtype=q.dtype, and so does "
              "np.sqrt(D): use math.sqrt. All layers after this one would go on in float64")
IN_PIECES = "after the first piece of a text the cache hands over more keys than queries: T < S"
SHARED = "H/K query heads use one key/value head: repeat that head, or see its queries as more rows"


def loop(q, k, v, scale=None, head_of=None, last_key=None):
    """Attention as plain loops over float64 numbers; the options make the usual mistakes."""
    (H, T, D), (K, S, _) = q.shape, k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    head_of = head_of or (lambda h: h // (H // K))
    last_key = last_key or (lambda t: S - T + t)
    out = np.zeros((H, T, D))
    for h in range(H):
        keys, values = k[head_of(h)], v[head_of(h)]
        for t in range(T):
            visible = min(S - 1, last_key(t)) + 1
            scores = [scale * sum(float(q[h, t, d]) * float(keys[s, d]) for d in range(D))
                      for s in range(visible)]
            largest = max(scores, default=0.0)
            weights = [math.exp(score - largest) for score in scores]
            for s in range(visible):
                out[h, t] += weights[s] / sum(weights) * values[s].astype(np.float64)
    return out


def random_qkv(H, K, T, S, D, seed=0):
    """Sizes differ from each other wherever they can, so that no mixed-up axis passes."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in ((H, T, D), (K, S, D), (K, S, D))]


# ── attention_np ─────────────────────────────────────────────────────────────────────────────


@check("one query that sees one key returns that key's value")
def one_key(attention_np):
    q, k, v = random_qkv(H=1, K=1, T=1, S=1, D=3)
    close(attention_np(q, k, v), v, hint="one weight alone is 1: softmax of one score")


@check("the weights are the softmax of the scores over √D")
def weights(attention_np):
    q, k, v = random_qkv(H=1, K=1, T=1, S=5, D=4)
    close(attention_np(q, k, v), loop(q, k, v), mistakes={
        "the scores are not divided by √D": loop(q, k, v, scale=1.0),
        "the scores are divided by D, not by its root": loop(q, k, v, scale=1 / 4),
        "the scores are multiplied by √D, not divided": loop(q, k, v, scale=2.0),
        "all keys count the same: is there a softmax of the scores?": loop(q, k, v, scale=0.0),
        "the softmax is over the queries; it is over the keys: each query's weights sum to 1":
            v.sum(axis=1, keepdims=True),
    })


@check("no query sees a key that comes after it")
def causal(attention_np):
    q, k, v = random_qkv(H=1, K=1, T=4, S=4, D=3)
    close(attention_np(q, k, v), loop(q, k, v), mistakes=mask_mistakes(q, k, v))


@check("the T queries are the last of the S positions")
def last_positions(attention_np):
    q, k, v = random_qkv(H=1, K=1, T=3, S=7, D=4)
    close(attention_np(q, k, v), loop(q, k, v), mistakes=mask_mistakes(q, k, v))


@check("query heads share key/value heads, neighbours together", hint=SHARED)
def grouped(attention_np):
    q, k, v = random_qkv(H=6, K=2, T=3, S=5, D=4)
    close(attention_np(q, k, v), loop(q, k, v), mistakes=group_mistakes(q, k, v))


@check("large scores do not overflow")
def overflow(attention_np):
    q, k, v = random_qkv(H=2, K=1, T=3, S=5, D=4)
    close(attention_np(1000 * q, k, v), loop(1000 * q, k, v), hint=OVERFLOW)


@check("heads that cannot be shared evenly are refused")
def uneven(attention_np):
    raises(ValueError, attention_np, *random_qkv(H=5, K=2, T=3, S=4, D=6),
           hint="5 query heads cannot share 2: raise ValueError, or call check_shapes")


@check("a whole model computes the right logits with it, and stays in float32", hint=IN_PIECES)
def in_the_engine(attention_np):
    close(logits_in_pieces(attention_np), logits_in_pieces(loop))
    same_dtype(attention_np)


# ── online_softmax_attention_np ──────────────────────────────────────────────────────────────


@check("one block that holds all keys: plain attention")
def one_block(online_softmax_attention_np):
    q, k, v = random_qkv(H=1, K=1, T=3, S=5, D=4)
    close(online_softmax_attention_np(q, k, v, block_size=8), loop(q, k, v), mistakes={
        "the scores are not divided by √D": loop(q, k, v, scale=1.0), **mask_mistakes(q, k, v)})


@check("any block size gives the same answer")
def any_block_size(online_softmax_attention_np):
    q, k, v = random_qkv(H=1, K=1, T=3, S=7, D=4)
    for block_size in (1, 2, 3, 7, 100):
        close(online_softmax_attention_np(q, k, v, block_size=block_size), loop(q, k, v), mistakes={
            "the last block, which is shorter, is left out":
                loop(q, k[:, :6], v[:, :6], last_key=lambda t: 4 + t)})


@check("a larger score that comes later shrinks what was summed before")
def rescale(online_softmax_attention_np):
    q, k, v = random_qkv(H=1, K=1, T=1, S=6, D=2)
    q, k = np.ones_like(q), np.arange(6.0)[None, :, None] * np.ones_like(k)  # scores rise
    close(online_softmax_attention_np(q, k, v, block_size=2), loop(q, k, v), mistakes={
        "the sums are not shrunk by exp(old − new) when a larger score comes":
            unshrunk(q, k, v, block_size=2),
        "the weighted values are not shrunk by exp(old − new), only the total is":
            unshrunk(q, k, v, block_size=2, total_too=False),
        "every block is divided by its own total: divide once, after the last block":
            sum(loop(q, k[:, start : start + 2], v[:, start : start + 2])
                for start in range(0, 6, 2)),
    })


@check("blocks that a query may not see add nothing", hint=(
    "a block whose keys are all masked has −∞ as its largest score, and exp(−∞ − (−∞)) is no "
    "number"))
def masked_blocks(online_softmax_attention_np):
    q, k, v = random_qkv(H=1, K=1, T=6, S=8, D=3)
    close(online_softmax_attention_np(q, k, v, block_size=2), loop(q, k, v),
          mistakes=mask_mistakes(q, k, v))


@check("query heads share key/value heads, neighbours together", hint=SHARED)
def online_grouped(online_softmax_attention_np):
    q, k, v = random_qkv(H=6, K=2, T=3, S=5, D=4)
    close(online_softmax_attention_np(q, k, v, block_size=2), loop(q, k, v),
          mistakes=group_mistakes(q, k, v))


@check("large scores do not overflow")
def online_overflow(online_softmax_attention_np):
    q, k, v = random_qkv(H=2, K=1, T=3, S=5, D=4)
    close(online_softmax_attention_np(1000 * q, k, v, block_size=2), loop(1000 * q, k, v),
          hint=OVERFLOW)


@check("it never holds the scores of all keys", twin=False)  # NumPy's memory is what is counted
def memory(online_softmax_attention_np):
    H, T, S = 2, 64, 4096
    q, k, v = random_qkv(H, K=1, T=T, S=S, D=2)  # k and v, once for each query head, are small
    peak = peak_bytes(online_softmax_attention_np, q, k, v, block_size=32)
    whole = H * T * S * q.itemsize
    require(peak < whole / 4, f"far less memory than all scores need, {whole:,} bytes",
            f"{peak:,} bytes at the peak",
            "the scores of all keys, or a mask for all of them, are built before the loop")


@check("a whole model computes the right logits with it, and stays in float32", hint=IN_PIECES)
def online_in_the_engine(online_softmax_attention_np):
    def blocks_of_3(q, k, v):
        return online_softmax_attention_np(q, k, v, block_size=3)

    close(logits_in_pieces(blocks_of_3), logits_in_pieces(loop))
    same_dtype(online_softmax_attention_np)


# ── In the engine ────────────────────────────────────────────────────────────────────────────


def logits_in_pieces(attention):
    """What a small random model expects after a prompt of 4 tokens, 3 more, and 1 more, with
    `attention` in every layer."""
    tokens, pieces = np.array([5, 2, 9, 2, 7, 0, 3, 8]), ((0, 4), (4, 7), (7, 8))
    weights = random_model()
    with using(attention_np=attention):
        cache = KVCache(weights.config, capacity=len(tokens), dtype=np.float64)
        return np.concatenate([
            forward_np(weights, tokens[start:end], np.arange(start, end), cache)
            for start, end in pieces])


def random_model():
    """Two layers, in float64; 6 query heads share 2 key/value heads."""
    rng = np.random.default_rng(4)
    C, F, V, (H, K, D) = 10, 14, 11, (6, 2, 4)
    config = ModelConfig(vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=2,
                         num_attention_heads=H, num_key_value_heads=K, head_dim=D)

    def matrix(*shape):
        return Dense(rng.normal(size=shape))

    layers = [LayerWeights(
        input_layernorm=np.ones(C), qkv_proj=matrix((H + 2 * K) * D, C), o_proj=matrix(C, H * D),
        post_attention_layernorm=np.ones(C), gate_proj=matrix(F, C), up_proj=matrix(F, C),
        down_proj=matrix(C, F)) for _ in range(config.num_hidden_layers)]
    return Weights(config, embed_tokens=matrix(V, C), layers=layers, norm=np.ones(C),
                   lm_head=matrix(V, C), inv_freq=np.array([1.0, 0.1]))


def same_dtype(attention):
    result = attention(*(x.astype(np.float32) for x in random_qkv(H=6, K=2, T=3, S=5, D=4)))
    dtype = getattr(result, "dtype", type(result).__name__)
    require(dtype == np.float32, "an array of float32", f"{dtype}", IN_FLOAT64)


# ── What the usual mistakes would return ─────────────────────────────────────────────────────


def mask_mistakes(q, k, v):
    T, S = q.shape[1], k.shape[1]
    return {
        "there is no mask: queries see the keys after them": loop(q, k, v, last_key=lambda t: S),
        "the mask starts at the first key: query t stands at position S − T + t":
            loop(q, k, v, last_key=lambda t: t),
        "a query does not see its own key": loop(q, k, v, last_key=lambda t: S - T + t - 1),
    }


def group_mistakes(q, k, v):
    H, K = q.shape[0], k.shape[0]
    return {
        "query head h belongs to key/value head h // (H/K), not to h % K":
            loop(q, k, v, head_of=lambda h: h % K),
        "all query heads use the first key/value head": loop(q, k, v, head_of=lambda h: 0),
        "query heads are in the reverse order": loop(q[::-1], k, v),
    } if H > K else {}


def unshrunk(q, k, v, block_size, total_too=True):
    """One query; each block's exponentials under the largest score so far, and left like that."""
    scores = [float(q[0, 0] @ key) / math.sqrt(len(key)) for key in k[0]]
    out, total, largest = np.zeros(q.shape[2]), 0.0, -math.inf
    for start in range(0, len(scores), block_size):
        block = scores[start : start + block_size]
        new = max(largest, *block)
        if not total_too:
            total *= math.exp(largest - new)
        largest = new
        for s, score in enumerate(block, start):
            out = out + math.exp(score - largest) * v[0, s]
            total += math.exp(score - largest)
    return (out / total)[None, None]

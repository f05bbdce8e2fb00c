"""Grader of chapter 03_transformer_block.

README.md in this folder tells how graders are written.
"""

from __future__ import annotations

import math

import numpy as np

from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import check, close, equal, require
from minillm.kv_cache import KVCache
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np

EPS = 1e-5
WIDE = "the mean of the squares is taken in float16: turn x into float32 first, and back at the end"
OBJECTS = ("a projection is an object, perhaps without a matrix of plain numbers: multiply with "
           "linear_np(x, gate_proj)")
OVERFLOW = "exp(z) / (1 + exp(z)) is ∞/∞ for a large z: 1 / (1 + exp(−z)) is not, nor is silu_np"


# ── The oracles: plain loops over float64 numbers; the options make the usual mistakes ────────


def norm_loop(x, weight, eps, scale=None):
    """scale: what a row (a list of numbers) is multiplied by, instead of 1/√(mean(x²) + eps)."""
    scale = scale or (lambda row: 1 / math.sqrt(mean_square(row) + eps))
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        row = [float(number) for number in x[index]]
        factor = scale(row)
        out[index] = [number * factor * float(w) for number, w in zip(row, weight)]
    return out


def mean_square(row):
    return sum(number * number for number in row) / len(row)


def rope_loop(x, cos, sin, pair=None, token=None, turn=None):
    """pair(i, half): the two entries of plane i.   token(n, h): whose angles turn it."""
    pair = pair or (lambda i, half: (i, i + half))
    token = token or (lambda n, h: n)
    turn = turn or (lambda a, b, c, s: (a * c - b * s, b * c + a * s))
    (N, H, D), out = x.shape, np.zeros(x.shape)
    for n, h, i in np.ndindex(N, H, D // 2):
        first, second = pair(i, D // 2)
        c, s = float(cos[token(n, h), i]), float(sin[token(n, h), i])
        out[n, h, first], out[n, h, second] = turn(
            float(x[n, h, first]), float(x[n, h, second]), c, s)
    return out


def silu(z):
    """z·σ(z), σ through tanh, which cannot overflow."""
    return z * (1 + math.tanh(z / 2)) / 2


def swiglu_loop(x, gate_proj, up_proj, down_proj, combine=None):
    """combine(gate, up): one number of the hidden layer."""
    combine = combine or (lambda gate, up: silu(gate) * up)
    out = []
    for row in x:
        gate, up = product_loop(gate_proj, row), product_loop(up_proj, row)
        out.append(product_loop(down_proj, [combine(g, u) for g, u in zip(gate, up)]))
    return np.array(out)


def product_loop(dense, row):
    bias = np.zeros(len(dense.weight)) if dense.bias is None else dense.bias
    return [sum(float(w) * float(number) for w, number in zip(weights, row)) + float(b)
            for weights, b in zip(dense.weight, bias)]


# ── rms_norm_np ──────────────────────────────────────────────────────────────────────────────


@check("one row, by hand: the mean of 3² and 4² is 12.5")
def norm_by_hand(rms_norm_np):
    x, weight = np.array([3.0, 4.0]), np.ones(2)
    close(rms_norm_np(x, weight, 0.0), x / math.sqrt(12.5), mistakes=norm_mistakes(x, weight, 0.0))


@check("each row, the last axis, is scaled by a mean of its own")
def norm_rows(rms_norm_np):
    x, ones = normal(4, 6) * np.array([[1.0], [10.0], [0.1], [3.0]]), np.ones(6)
    all_rows, columns = mean_square(x.ravel()), [mean_square(column) for column in x.T]
    close(rms_norm_np(x, ones, EPS), norm_loop(x, ones, EPS), mistakes={
        "one mean is taken of all rows together: mean over the last axis, and keep that axis":
            x / math.sqrt(all_rows + EPS),
        "the mean is taken over the tokens, not over the entries of a token":
            x / np.sqrt(np.array(columns) + EPS), **norm_mistakes(x, ones, EPS)})


@check("the learned weight multiplies the scaled row")
def norm_weight(rms_norm_np):
    x, weight = normal(3, 5), normal(5)
    close(rms_norm_np(x, weight, EPS), norm_loop(x, weight, EPS), mistakes={
        "the learned weight is left out": norm_loop(x, np.ones(5), EPS),
        "the weight is used as 1 + weight, as Gemma stores it": norm_loop(x, 1 + weight, EPS),
        "the row is weighed first, and its mean square taken of that":
            norm_loop(x * weight, np.ones(5), EPS), **norm_mistakes(x, weight, EPS)})


@check("eps stands under the root, beside the mean")
def norm_eps(rms_norm_np):
    x, weight, eps = normal(3, 5) / 4, normal(5), 0.25
    close(rms_norm_np(x, weight, eps), norm_loop(x, weight, eps), mistakes={
        "eps is added to the root, not under it":
            norm_loop(x, weight, 0, lambda row: 1 / (math.sqrt(mean_square(row)) + eps)),
        "eps is left out": norm_loop(x, weight, 0.0),
        "eps is 1e-5, whatever the argument says": norm_loop(x, weight, 1e-5),
        "eps is 1e-6, whatever the argument says": norm_loop(x, weight, 1e-6),
        **norm_mistakes(x, weight, eps)})


@check("a row of zeros stays a row of zeros", hint="0/0: eps keeps the root away from 0")
def norm_zeros(rms_norm_np):
    x = np.stack([np.zeros(4), np.ones(4)])
    close(rms_norm_np(x, np.ones(4), EPS), norm_loop(x, np.ones(4), EPS))


@check("rows may stand in any shape: [N, H, D] is N·H rows of D",
       hint="the mean is over the last axis, axis=-1, wherever that is; keep it with keepdims")
def norm_heads(rms_norm_np):
    x, weight = normal(3, 2, 5), normal(5)
    close(rms_norm_np(x, weight, EPS), norm_loop(x, weight, EPS))


@check("a float16 row of large numbers does not overflow", hint=WIDE)
def norm_narrow(rms_norm_np):
    x = np.array([[300.0, -400.0, 200.0, 100.0]], np.float16)
    with np.errstate(over="ignore"):
        got = rms_norm_np(x, np.ones(4, np.float16), EPS)
    close(got, norm_loop(x, np.ones(4), EPS), tolerance=2e-3)


@check("a small random model gives the right logits with it")
def norm_in_the_engine(rms_norm_np):
    in_the_engine(rms_norm_np=rms_norm_np)


# ── rope_np ──────────────────────────────────────────────────────────────────────────────────


@check("a quarter turn takes (1, 0) to (0, 1), and (0, 1) to (−1, 0)")
def quarter_turn(rope_np):
    x, cos, sin = np.array([[[1.0, 0.0], [0.0, 1.0]]]), np.zeros((1, 1)), np.ones((1, 1))
    close(rope_np(x, cos, sin), [[[0, 1], [-1, 0]]], mistakes=turn_mistakes(x, cos, sin))


@check("the two coordinates are scaled by cos, and mixed by sin")
def one_plane(rope_np):
    x, (cos, sin) = normal(1, 1, 2), angles(1, 1)
    close(rope_np(x, cos, sin), rope_loop(x, cos, sin), mistakes=turn_mistakes(x, cos, sin))


@check("entries i and i + D/2 of a head are the two coordinates of plane i")
def planes(rope_np):
    x, (cos, sin) = normal(1, 1, 6), angles(1, 3)
    neighbours = rope_loop(x, cos, sin, pair=lambda i, half: (2 * i, 2 * i + 1))
    sorted_out = np.concatenate([neighbours[..., 0::2], neighbours[..., 1::2]], axis=-1)
    mixed_in = rope_loop(x, cos, sin).reshape(1, 1, 2, 3).swapaxes(2, 3).reshape(1, 1, 6)
    close(rope_np(x, cos, sin), rope_loop(x, cos, sin), mistakes={
        "neighbours (2i, 2i + 1) are paired, as in the paper and in GGUF files": neighbours,
        "neighbours are paired, and then sorted into halves": sorted_out,
        "the turned pairs stand side by side: all a belong in the first half, all b in the second":
            mixed_in,
        "entry i is paired with entry D − 1 − i":
            rope_loop(x, cos, sin, pair=lambda i, half: (i, 2 * half - 1 - i)),
        **turn_mistakes(x, cos, sin)})


@check("each token is turned by the angles of its own position, all its heads alike")
def tokens_and_heads(rope_np):
    x, (cos, sin) = normal(3, 3, 4), angles(3, 2)  # as many heads as tokens: broadcasting is mute
    close(rope_np(x, cos, sin), rope_loop(x, cos, sin), mistakes={
        "head h is turned by the angles of token h: give cos and sin an axis for the heads, "
        "[N, 1, D/2]": rope_loop(x, cos, sin, token=lambda n, h: h),
        "all tokens are turned by the angles of the first":
            rope_loop(x, cos, sin, token=lambda n, h: 0)})


@check("any number of tokens, heads and planes", hint=(
    "cos and sin are [N, D/2] and x is [N, H, D]: put an axis for the heads between them"))
def any_shape(rope_np):
    x, (cos, sin) = normal(4, 3, 10), angles(4, 5)
    close(rope_np(x, cos, sin), rope_loop(x, cos, sin))


@check("a query and a key a fixed distance apart have one dot product, wherever they stand",
       hint="both must be turned, and by an angle that grows with the position")
def relative(rope_np):
    q, k = normal(1, 1, 8), normal(2, 1, 8)[1:]
    inv_freq = 100.0 ** (-np.arange(4) / 4)

    def score(q_position, k_position):
        turned = []
        for x, position in ((q, q_position), (k, k_position)):
            angle = position * inv_freq[None]
            turned.append(np.asarray(rope_np(x, np.cos(angle), np.sin(angle)), np.float64))
        return float((turned[0] * turned[1]).sum())

    close(score(907, 900), score(7, 0))
    require(abs(score(8, 0) - score(7, 0)) > 1e-3, "another dot product at another distance",
            "the same", "the positions have no effect: is x returned as it came?")


@check("a small random model gives the right logits with it")
def rope_in_the_engine(rope_np):
    in_the_engine(rope_np=rope_np)


# ── swiglu_np ────────────────────────────────────────────────────────────────────────────────


@check("one hidden number, by hand: silu(1)·2·3")
def swiglu_by_hand(swiglu_np):
    x, dense = np.array([[1.0]]), [Dense(np.array([[number]])) for number in (1.0, 2.0, 3.0)]
    close(swiglu_np(x, *dense), [[6 / (1 + math.exp(-1))]], mistakes=gate_mistakes(x, *dense))


@check("silu of the gate times up, then down")
def gated(swiglu_np):
    x, dense = normal(3, 4), mlp(C=4, F=6)
    close(swiglu_np(x, *dense), swiglu_loop(x, *dense), mistakes=gate_mistakes(x, *dense))


@check("biases are added, where the projections have them", hint=(
    "linear_np(x, gate_proj) adds the bias; a product with gate_proj.weight alone does not"))
def biased(swiglu_np):
    x, dense = normal(3, 4), mlp(C=4, F=6, biased=True)
    close(swiglu_np(x, *dense), swiglu_loop(x, *dense), mistakes=gate_mistakes(x, *dense))


@check("a projection may be any object that multiplies", hint=OBJECTS)
def objects(swiglu_np):
    x, dense = normal(3, 4), mlp(C=4, F=6)
    close(swiglu_np(x, *map(Opaque, dense)), swiglu_loop(x, *dense))


@check("each projection multiplies each row once: 6·N·C·F FLOPs", hint=OBJECTS)
def cost(swiglu_np):
    x, dense = normal(5, 4), mlp(C=4, F=6)
    gate, up, down = map(Opaque, dense)
    swiglu_np(x, gate, up, down)
    equal([gate.rows, up.rows, down.rows], [5, 5, 5], mistakes={
        "x·Gᵀ is computed twice: keep it in a variable, z·σ(z) needs it twice": [10, 5, 5],
        "the other projections are not used": [5, 0, 0]})


@check("gates far from 0 do not overflow", hint=OVERFLOW)
def overflow(swiglu_np):
    x, (gate, up, down) = normal(3, 4), mlp(C=4, F=6)
    gate = Dense(3000 * gate.weight)
    with np.errstate(over="ignore"):  # what becomes 0 in the end may have been ∞ on the way
        got = swiglu_np(x, gate, up, down)
    close(got, swiglu_loop(x, gate, up, down))


@check("a small random model gives the right logits with it")
def swiglu_in_the_engine(swiglu_np):
    in_the_engine(swiglu_np=swiglu_np)


# ── Inputs ───────────────────────────────────────────────────────────────────────────────────


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape)


def angles(N, half):
    turned = np.random.default_rng(half).uniform(0.3, 1.2, size=(N, half))
    return np.cos(turned), np.sin(turned)


def mlp(C, F, biased=False):
    """Gate, up and down: their biases are random, or none."""
    rng = np.random.default_rng(C)
    return [Dense(rng.normal(size=(rows, columns)), rng.normal(size=rows) if biased else None)
            for rows, columns in ((F, C), (F, C), (C, F))]


class Opaque:
    """A projection that multiplies, counts the rows, and shows no matrix, as a packed one."""

    bias = None

    def __init__(self, dense):
        self._numbers, self.rows = dense.weight, 0

    def matmul_np(self, x):
        self.rows += len(x)
        return x @ self._numbers.T

    def matmul_torch(self, x):
        import torch

        self.rows += len(x)
        return x @ torch.from_numpy(self._numbers).T


def in_the_engine(**students):
    """Logits of a random model: prefill, then decode, with one student's function and our loops."""
    loops = {"rms_norm_np": norm_loop, "rope_np": rope_loop, "swiglu_np": swiglu_loop}
    with using(**loops):
        expected = logits_of_random_model()
    with using(**loops | students):
        got = logits_of_random_model()
    close(got, expected, tolerance=1e-4, hint=(  # the norm may compute in float32
        "where all checks above pass, is the result of another shape or dtype?"))


def logits_of_random_model():
    config = ModelConfig(vocab_size=13, hidden_size=10, intermediate_size=14, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    (H, K, D), C, rng = config.heads, config.hidden_size, np.random.default_rng(3)

    def dense(rows, columns):
        return Dense(rng.normal(size=(rows, columns)) / math.sqrt(columns))

    layers = [LayerWeights(
        input_layernorm=rng.normal(size=C), qkv_proj=dense((H + 2 * K) * D, C),
        o_proj=dense(C, H * D), post_attention_layernorm=rng.normal(size=C),
        gate_proj=dense(config.intermediate_size, C), up_proj=dense(config.intermediate_size, C),
        down_proj=dense(C, config.intermediate_size)) for _ in range(config.num_hidden_layers)]
    weights = Weights(config, embed_tokens=dense(config.vocab_size, C), layers=layers,
                      norm=rng.normal(size=C), lm_head=dense(config.vocab_size, C),
                      inv_freq=100.0 ** (-np.arange(D // 2) / (D // 2)))
    tokens, cache = rng.integers(config.vocab_size, size=7), KVCache(config, 7, np.float64)
    return np.concatenate([
        forward_np(weights, tokens[start:end], np.arange(start, end), cache)
        for start, end in ((0, 5), (5, 6), (6, 7))])


# ── What the usual mistakes would return ─────────────────────────────────────────────────────


def norm_mistakes(x, weight, eps):
    def variance(row):
        return mean_square(row) - (sum(row) / len(row)) ** 2

    def scaled(scale):
        return norm_loop(x, weight, eps, scale)

    centred = x - x.mean(axis=-1, keepdims=True)
    return {
        "the squares are added up, but not divided by C: a mean, not a sum":
            scaled(lambda row: 1 / math.sqrt(len(row) * mean_square(row) + eps)),
        "the root is missing: divide by √(mean(x²) + eps)":
            scaled(lambda row: 1 / (mean_square(row) + eps)),
        "the row is multiplied by the root, not divided":
            scaled(lambda row: math.sqrt(mean_square(row) + eps)),
        "the mean is subtracted first: that is LayerNorm": norm_loop(centred, weight, eps),
        "the standard deviation is taken, in which the mean is subtracted":
            scaled(lambda row: 1 / math.sqrt(variance(row) + eps)),
        "the mean of |x| is taken, not the root of the mean of x²":
            scaled(lambda row: len(row) / (sum(map(abs, row)) + len(row) * eps)),
    }


def turn_mistakes(x, cos, sin):
    return {
        "it turns the other way: a·cos − b·sin and b·cos + a·sin": rope_loop(x, cos, -sin),
        "b is turned with the new a: compute both from the old ones": rope_loop(
            x, cos, sin, turn=lambda a, b, c, s: (a * c - b * s, b * c + (a * c - b * s) * s)),
        "cos and sin are exchanged": rope_loop(x, sin, cos),
        "both sines have the same sign, so lengths change": rope_loop(
            x, cos, sin, turn=lambda a, b, c, s: (a * c + b * s, b * c + a * s)),
        "the turned a and b are exchanged": rope_loop(
            x, cos, sin, turn=lambda a, b, c, s: (b * c + a * s, a * c - b * s)),
        "x comes back as it was": x,
    }


def gate_mistakes(x, gate_proj, up_proj, down_proj):
    def combined(combine):
        return swiglu_loop(x, gate_proj, up_proj, down_proj, combine)

    return {
        "silu is applied to up, not to the gate": combined(lambda gate, up: gate * silu(up)),
        "the gate is σ(z), not silu(z) = z·σ(z)":
            combined(lambda gate, up: (1 + math.tanh(gate / 2)) / 2 * up),
        "silu is applied to the product of gate and up": combined(lambda gate, up: silu(gate * up)),
        "silu is applied to both": combined(lambda gate, up: silu(gate) * silu(up)),
        "the gate and up are added, not multiplied": combined(lambda gate, up: silu(gate) + up),
        "up is left out": combined(lambda gate, up: silu(gate)),
        "silu is left out": combined(lambda gate, up: gate * up),
        "that is ReLU, not silu": combined(lambda gate, up: max(gate, 0) * up),
        "that is GELU, not silu": combined(
            lambda gate, up: gate * (1 + math.erf(gate / math.sqrt(2))) / 2 * up),
    }

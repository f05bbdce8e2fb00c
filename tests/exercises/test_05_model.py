"""Grader of chapter 05_model. README.md in this folder tells how graders are written."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np

from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import CheckFailed, as_array, check, close, equal, peak_bytes, require
from minillm.linear import Dense
from minillm.loading.checkpoint import Checkpoint
from minillm.model import LayerWeights, Weights
from minillm.model_runner import NumpyRunner
from minillm.rope import rope_frequencies

# Sizes differ from each other wherever they can, so that no mixed-up axis passes.
SIZES = {"vocab_size": 23, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 1,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 0.1,
         "rope_theta": 100.0}
TOKENS = np.array([7, 0, 19, 7, 12])

# What the usual mistakes are called, and what they look like in a report.
SLIPS = {
    "replaced": "x is replaced by what a sublayer brings: it is added, x = x + o_proj(…)",
    "normed": "the normed x is carried on: the norm is for the sublayer alone, x itself goes on",
    "no input norm": "attention reads x as it is: input_layernorm comes before qkv_proj",
    "no second norm": "swiglu reads x as it is: post_attention_layernorm comes before it",
    "parallel": "swiglu reads x as it was before attention: norm the new x for it",
    "no last norm": "the last norm, weights.norm, is missing before the head",
    "no eps": "the eps of the norms is weights.config.rms_norm_eps",
    "unrotated": "q and k are not rotated: every token looks as if at the same position",
    "only q": "k is not rotated, only q is",
    "v too": "v is rotated too: only q and k are",
    "k first": "the rows of qkv_proj are q's heads, then k's, then v's",
    "from zero": "positions are counted from 0 in every pass: use `positions`",
    "first layer": "every layer has weights of its own: layer i of the loop is weights.layers[i]",
    "no biases": "the biases are left out: linear_np adds them",
    "no head norms": "qk_norm is left out: where it is not None, it norms each head of q and k",
    "head norms late": "qk_norm comes before the rotation, not after it",
}


def random_model(seed=0, biases=False, head_norms=False, dtype=np.float64, **sizes):
    """Weights as loading makes them, of random numbers, none of which is 0 or 1 by default."""
    config = ModelConfig(**(SIZES | sizes))
    rng = np.random.default_rng(seed)
    V, C, F = config.vocab_size, config.hidden_size, config.intermediate_size
    H, K, D = config.heads

    def vector(*shape):
        return rng.uniform(0.4, 1.6, size=shape).astype(dtype)

    def matrix(rows, columns, bias=False):
        return Dense((rng.normal(size=(rows, columns)) / math.sqrt(columns)).astype(dtype),
                     rng.normal(size=rows).astype(dtype) if bias else None)

    layers = [LayerWeights(
        input_layernorm=vector(C), qkv_proj=matrix((H + 2 * K) * D, C, biases),
        o_proj=matrix(C, H * D, biases), post_attention_layernorm=vector(C),
        gate_proj=matrix(F, C, biases), up_proj=matrix(F, C, biases),
        down_proj=matrix(C, F, biases), qk_norm=vector(H + K, D) if head_norms else None)
        for _ in range(config.num_hidden_layers)]
    return Weights(config, matrix(V, C), layers, vector(C), matrix(V, C), rope_frequencies(config))


class Cache:
    """Every token sees those before it in its layer, and itself. NumPy and PyTorch are welcome.

    layers: the layer of every call.
    """

    def __init__(self, config):
        self.config, self.layers, self.keys, self.values = config, [], {}, {}

    def attend(self, layer, q, k, v):
        H, K, D = self.config.heads
        for name, given, heads in (("q", q, H), ("k", k, K), ("v", v, K)):
            shape = tuple(getattr(given, "shape", ()))
            require(shape == (len(q), heads, D),
                    f"cache.attend to be given {name} of shape [N, {heads}, {D}]",
                    f"{name} of shape {list(shape)}",
                    "reshape what qkv_proj gives to [N, heads, D]; k and v have K heads, q has H")
        self.layers.append(layer)
        keys, values = self.keys.setdefault(layer, []), self.values.setdefault(layer, [])
        out = np.zeros((len(q), H, D))
        for t in range(len(q)):
            keys.append(as_array(k[t], "an array"))
            values.append(as_array(v[t], "an array"))
            out[t] = attend(as_array(q[t], "an array"), keys, values)
        return q.new_tensor(out) if hasattr(q, "new_tensor") else out.astype(q.dtype)


def attend(queries, keys, values):
    """One token's heads, which see all the keys: plain loops."""
    heads = []
    for h, query in enumerate(queries):
        group = h // (len(queries) // len(keys[0]))
        scores = [dot(query, key[group]) / math.sqrt(len(query)) for key in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        heads.append([dot(weights, [value[group][d] for value in values]) / sum(weights)
                      for d in range(len(query))])
    return heads


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


def loop(weights, tokens, positions, slip=None):
    """The forward pass as plain loops over float64 numbers; `slip` makes one of SLIPS."""
    config = weights.config
    (H, K, D), eps = config.heads, 0.0 if slip == "no eps" else config.rms_norm_eps
    positions = range(len(tokens)) if slip == "from zero" else positions

    def linear(x, matrix):
        biases = [0.0] * len(matrix.weight)
        if matrix.bias is not None and slip != "no biases":
            biases = matrix.bias
        return [dot(row, x) + float(bias) for row, bias in zip(matrix.weight, biases)]

    def norm(x, scales):
        size = math.sqrt(dot(x, x) / len(x) + eps)
        return [float(number) / size * float(scale) for number, scale in zip(x, scales)]

    def rotate(head, position):
        out, half = [0.0] * D, D // 2
        for i, frequency in enumerate(weights.inv_freq):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            out[i] = head[i] * cos - head[i + half] * sin
            out[i + half] = head[i + half] * cos + head[i] * sin
        return out

    def heads_of(x, layer, position):
        """q, k, v of one token."""
        numbers = linear(x, layer.qkv_proj)
        heads = [numbers[D * i : D * (i + 1)] for i in range(H + 2 * K)]
        if slip == "k first":
            heads = heads[K : K + H] + heads[:K] + heads[K + H :]
        late = slip == "head norms late"
        for i in range(H + 2 * K):
            normed = layer.qk_norm is not None and i < H + K and slip != "no head norms"
            turned = i < {"unrotated": 0, "only q": H, "v too": H + 2 * K}.get(slip, H + K)
            if normed and not late:
                heads[i] = norm(heads[i], layer.qk_norm[i])
            if turned:
                heads[i] = rotate(heads[i], position)
            if normed and late:
                heads[i] = norm(heads[i], layer.qk_norm[i])
        return heads[:H], heads[H : H + K], heads[H + K :]

    def swiglu(x, layer):
        gate = [number / (1 + math.exp(-number)) for number in linear(x, layer.gate_proj)]
        up = linear(x, layer.up_proj)
        return linear([a * b for a, b in zip(gate, up)], layer.down_proj)

    def added(x, more):
        return more if slip == "replaced" else [a + b for a, b in zip(x, more)]

    rows = [[float(number) for number in weights.embed_tokens.weight[token]] for token in tokens]
    for layer in weights.layers:
        layer = weights.layers[0] if slip == "first layer" else layer
        keys, values = [], []
        for t, x in enumerate(rows):
            h = x if slip == "no input norm" else norm(x, layer.input_layernorm)
            q, k, v = heads_of(h, layer, int(positions[t]))
            keys.append(k)
            values.append(v)
            brought = linear([*chain(*attend(q, keys, values))], layer.o_proj)
            before, x = x, added(h if slip == "normed" else x, brought)
            h = norm(before if slip == "parallel" else x, layer.post_attention_layernorm)
            h = x if slip == "no second norm" else h
            rows[t] = added(h if slip == "normed" else x, swiglu(h, layer))
    return np.array([linear(x if slip == "no last norm" else norm(x, weights.norm),
                            weights.lm_head) for x in rows])


def compare(forward_np, weights, tokens=TOKENS, positions=None, slips=(), hint=None):
    """One pass into an empty cache, against the loop."""
    positions = np.arange(len(tokens)) if positions is None else positions
    cache = Cache(weights.config)
    got = forward_np(weights, tokens, positions, cache)
    equal(cache.layers, list(range(len(weights.layers))),
          hint="call cache.attend once for each layer, with the index of that layer")
    close(got, loop(weights, tokens, positions), hint=hint, mistakes={
        SLIPS[slip]: loop(weights, tokens, positions, slip) for slip in slips})


# ── forward_np ───────────────────────────────────────────────────────────────────────────────


@check("around layers that add nothing: the token's embedding, the last norm, the head")
def embedding_and_head(forward_np):
    weights = random_model()
    for matrix in (weights.layers[0].o_proj, weights.layers[0].down_proj):
        matrix.weight[:] = 0
    compare(forward_np, weights, TOKENS[:2], slips=["no last norm", "no eps", "normed", "replaced"])


@check("one token through one layer: norm, attention, add; norm, feed-forward, add")
def one_token(forward_np):
    compare(forward_np, random_model(), TOKENS[:1], slips=[
        "replaced", "normed", "no input norm", "no second norm", "parallel", "no last norm",
        "no eps", "k first"], hint="in each layer: x = x + o_proj(attend(q, k, v)), with q, k, v "
        "from a normed x, and then x = x + swiglu(…), from the new x under the second norm")


@check("several tokens: q and k are rotated by their positions")
def several_tokens(forward_np):
    compare(forward_np, random_model(), slips=["unrotated", "only q", "v too", "k first"], hint=(
        "cut the [N, H + 2·K, D] heads into H of q, K of k and K of v; rotate q and k"))


@check("positions are what the caller says")
def positions(forward_np):
    compare(forward_np, random_model(), positions=np.array([3, 4, 11, 5, 0]),
            slips=["from zero", "unrotated", "only q"])


@check("several layers, each with its own weights, one after the other")
def several_layers(forward_np):
    compare(forward_np, random_model(num_hidden_layers=3), slips=["first layer"])


@check("biases, where there are some, are added")
def biases(forward_np):
    compare(forward_np, random_model(biases=True), slips=["no biases"])


@check("the norms of single heads, where there are some, come before the rotation")
def head_norms(forward_np):
    compare(forward_np, random_model(head_norms=True), slips=["no head norms", "head norms late"])


@check("a text in pieces is the text in one: what came before is in the cache")
def pieces(forward_np):
    weights = random_model(num_hidden_layers=2)
    cache, places = Cache(weights.config), np.arange(len(TOKENS))
    got = [forward_np(weights, TOKENS[start:end], places[start:end], cache)
           for start, end in ((0, 3), (3, 4), (4, 5))]
    for logits in got:
        as_array(logits, "logits")
    close(np.concatenate(got), loop(weights, TOKENS, places), hint=(
        "a later pass has its own positions, and hands the cache only its own tokens"))


@check("rows: the logits of the tokens that are asked for, in that order")
def rows(forward_np):
    weights, places = random_model(num_hidden_layers=2), np.arange(len(TOKENS))
    expected = loop(weights, TOKENS, places)
    for wanted in ([4], [3, 1], [0, 1, 2, 3, 4]):
        close(forward_np(weights, TOKENS, places, Cache(weights.config), wanted), expected[wanted],
              hint=f"rows={wanted} asks for {len(wanted)} of 5 tokens; all of them still go "
                   "through the layers, since later tokens look at them",
              mistakes={"the rows are sorted: keep the caller's order": expected[sorted(wanted)]})


@check("the head multiplies only the rows that are asked for", twin=False)  # NumPy's memory counts
def head_rows(forward_np):
    weights = random_model(vocab_size=8192)
    tokens = np.arange(16)
    peak = peak_bytes(forward_np, weights, tokens, tokens, Cache(weights.config), rows=[15])
    whole = len(tokens) * 8192 * 8
    require(peak < whole / 2, f"far less memory than the logits of all 16 tokens, {whole:,} bytes",
            f"{peak:,} bytes at the peak",
            "the logits of all tokens are computed, and then thrown away: choose the rows of x "
            "before the head")


@check("float32 weights make float32 logits")
def stays_float32(forward_np):
    weights, places = random_model(dtype=np.float32), np.arange(len(TOKENS))
    got = forward_np(weights, TOKENS, places, Cache(weights.config))
    close(got, loop(weights, TOKENS, places), tolerance=1e-4)
    equal(str(got.dtype), "float32", hint="inv_freq is float64, and so are cos and sin: cast them "
                                          "to x's dtype, or every array after them is twice as "
                                          "large, and every product twice as slow")


@check("the engine runs on it: prompt, then token by token, from the engine's own cache",
       twin=False)  # the engine's NumPy runner calls it, with NumPy's cache
def in_the_engine(forward_np):
    weights = random_model(num_hidden_layers=2, seed=1)
    with using(forward_np=forward_np):
        runner = NumpyRunner(RandomCheckpoint(weights), dtype="float64")
        cache = runner.new_cache(8)
        token_ids = TOKENS[:3].tolist()
        logits = runner.forward(token_ids, [0, 1, 2], cache, rows=[2])
        for position in range(3, 7):
            expected = loop(weights, token_ids, range(len(token_ids)))[-1:]
            close(logits, expected, hint="it passed alone, and not inside: is the result for "
                                         "`rows`, and are k and v handed to the cache once?")
            second, best = np.sort(expected[0])[-2:]
            if best - second > 1e-6:
                equal(int(np.argmax(logits)), int(np.argmax(expected)))
            token_ids.append(int(np.argmax(expected)))
            logits = runner.forward(token_ids[-1:], [position], cache, rows=[0])


class RandomCheckpoint(Checkpoint):
    """A random model as the engine loads one: a tensor for each name."""

    rope_freq_factors = None

    def __init__(self, weights):
        self.config, self.weights = weights.config, weights

    def tensor(self, name, shape):
        tensor = self._named(*name.removesuffix(".weight").split("."))
        if tensor.shape != shape:
            raise CheckFailed(f"{name} of shape {shape}", str(tensor.shape), "the grader is at "
                              "fault, not you: please report it")
        return tensor

    def _named(self, first, *path):
        if first == "lm_head":
            return self.weights.lm_head.weight
        if path == ("norm",):
            return self.weights.norm
        if path == ("embed_tokens",):
            return self.weights.embed_tokens.weight
        layer, part = self.weights.layers[int(path[1])], path[-1]
        if part in ("q_proj", "k_proj", "v_proj"):
            H, K, D = self.config.heads
            bounds = [0, H * D, (H + K) * D]
            q, k, v = (layer.qkv_proj.weight[start:end]
                       for start, end in zip(bounds, [*bounds[1:], None]))
            return {"q_proj": q, "k_proj": k, "v_proj": v}[part]
        thing = getattr(layer, part)
        return thing.weight if isinstance(thing, Dense) else thing

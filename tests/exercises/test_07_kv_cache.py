"""Grader of chapter 07_kv_cache. README.md in this folder tells how graders are written."""

from __future__ import annotations

import math

import numpy as np

import minillm.kv_cache
from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import as_array, check, close, equal, peak_bytes, raises, require
from minillm.generate import decode, prefill
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np
from minillm.request import Request
from minillm.sampling import sample_np
from minillm.sampling_params import SamplingParams

# Pairwise different, so that no mixed-up axis passes.
L, H, K, D = 3, 6, 2, 4
CONFIG = ModelConfig(vocab_size=13, hidden_size=10, intermediate_size=7, num_hidden_layers=L,
                     num_attention_heads=H, num_key_value_heads=K, head_dim=D)
SILENT = ("a token that does not fit is dropped without a word: compare the end with the capacity "
          "before you write")
CHANGED = "a refused append has changed the cache: check first, then write"


def loop(q, k, v, last_key=None):
    """Causal attention as plain loops over float64 numbers.   q: [N, H, D], k, v: [S, K, D]."""
    (N, H, D), (S, K, _) = q.shape, k.shape
    last_key = last_key or (lambda n: S - N + n)
    out = np.zeros((N, H, D))
    for n in range(N):
        for h in range(H):
            keys, values = k[:, h // (H // K)], v[:, h // (H // K)]
            visible = min(S - 1, last_key(n)) + 1
            scores = [sum(float(q[n, h, d]) * float(keys[s, d]) for d in range(D)) / math.sqrt(D)
                      for s in range(visible)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for s in range(visible):
                out[n, h] += weights[s] / sum(weights) * values[s].astype(np.float64)
    return out


def tokens(num_tokens, seed=0):
    """q [N, H, D], k and v [N, K, D]."""
    rng = np.random.default_rng([num_tokens, seed])
    return [rng.normal(size=(num_tokens, heads, D)) for heads in (H, K, K)]


def new(KVCache, capacity):
    return KVCache(CONFIG, capacity, np.float64)


def append(cache, layer, k, v):
    """cache.append, and its answer as two arrays."""
    answer = cache.append(layer, k, v)
    require(isinstance(answer, (tuple, list)) and len(answer) == 2, "keys and values, a pair",
            f"a {type(answer).__name__}", "append ends in `return keys, values`")
    return [as_array(each, "an array [K, S, D]") for each in answer]


def attend_all(cache, q, k, v, layers=range(L)):
    """The tokens through the layers, as a forward pass does it; -> what the last one returned."""
    for layer in layers:
        out = cache.attend(layer, q, k, v)
    return as_array(out, f"an array of shape {q.shape}")


def holds(answer, k, v, capacity=None):
    """append's answer is k, v [S, K, D] with heads in front."""
    S = len(k)
    shape_hints = {
        (K, capacity, D): "all of the capacity is returned, also rows that nobody has written: "
                          "return the first S",
        (S, K, D): "append returns heads first: [K, S, D]",
        (K, 1, D): "only the new token is returned, not all that the layer holds",
    }
    for name, got, expected in zip(("keys", "values"), answer, (k, v)):
        expected = np.swapaxes(expected, 0, 1)
        require(got.shape == expected.shape, f"{name} of shape [K, S, D] = {expected.shape}",
                f"shape {got.shape}", shape_hints.get(got.shape))
        close(got, expected, mistakes={
            "the new tokens stand before the old ones": np.roll(expected, 1, axis=1),
            "keys and values are exchanged": np.swapaxes(v if name == "keys" else k, 0, 1),
        }, hint=f"some {name} are not those that were handed over, in their order")


# ── append ───────────────────────────────────────────────────────────────────────────────────


@check("a new cache is empty, and knows its capacity")
def empty(KVCache):
    cache = new(KVCache, 5)
    equal(cache.length, 0, hint="length counts the tokens written, not those that would fit")
    equal(cache.capacity, 5, hint="keep it in __init__: self.capacity = capacity")


@check("append returns the first tokens, heads in front")
def first_tokens(KVCache):
    _, k, v = tokens(3)
    holds(append(new(KVCache, 5), 0, k, v), k, v, capacity=5)


@check("append writes behind what is there, and returns all of it")
def behind(KVCache):
    _, k, v = tokens(5)
    cache = new(KVCache, 7)
    append(cache, 0, k[:2], v[:2])
    append(cache, 0, k[2:4], v[2:4])
    answer = append(cache, 0, k[4:], v[4:])
    require(answer[0].shape[1] >= 1, "the tokens that the layer holds", "none")
    holds(answer, k, v, capacity=7)


@check("each layer counts its own tokens")
def layers(KVCache):
    cache, k, v = new(KVCache, 9), *tokens(3)[1:]
    for start, end in ((0, 2), (2, 3)):
        for layer in range(L):
            keys, values = append(cache, layer, k[start:end] + layer, v[start:end] - layer)
            require(keys.shape[1] == end, f"{end} tokens in layer {layer}", f"{keys.shape[1]}",
                    "one count for all layers moves on while the same tokens pass through the "
                    "next layer: keep one count a layer")
            holds((keys, values), k[:end] + layer, v[:end] - layer, capacity=9)


@check("length is what every layer has", hint="it is the smallest of the layers' counts")
def length(KVCache):
    cache, k, v = new(KVCache, 9), *tokens(2)[1:]
    counts = []
    for layer in (0, 1, 2, 0, 1, 2):
        append(cache, layer, k, v)
        counts.append(cache.length)
    equal(counts, [0, 0, 2, 2, 2, 4], mistakes={
        "length is the longest layer's: in the middle of a pass the others lack those tokens":
            [2, 2, 2, 4, 4, 4],
        "length adds up the layers": [2, 4, 6, 8, 10, 12],
        "length counts calls, not tokens": [0, 0, 1, 1, 1, 2],
        "length is the last appended layer's": [2, 2, 2, 4, 4, 4],
    })


@check("a cache can be filled to the last row, and not beyond")
def full(KVCache):
    _, k, v = tokens(6)
    cache = new(KVCache, 5)
    append(cache, 0, k[:3], v[:3])
    try:
        append(cache, 0, k[3:5], v[3:5])
    except ValueError:
        require(False, "5 tokens to fit in a capacity of 5", "a ValueError",
                "the last row is free too: refuse only what ends beyond the capacity")
    raises(ValueError, cache.append, 0, k[5:], v[5:], hint=SILENT)
    raises(ValueError, new(KVCache, 5).append, 0, k, v, hint=SILENT)


@check("an append that is refused changes nothing")
def refused(KVCache):
    _, k, v = tokens(6)
    cache = new(KVCache, 4)
    for layer in range(L):
        append(cache, layer, k[:3], v[:3])
    raises(ValueError, cache.append, 0, k[3:6], v[3:6], hint=SILENT)
    equal(cache.length, 3, hint=CHANGED)
    try:
        answer = append(cache, 0, k[3:4], v[3:4])
    except ValueError:
        require(False, "room for one token", "a ValueError", CHANGED)
    require(answer[0].shape[1] == 4, "4 tokens", f"{answer[0].shape[1]}", CHANGED)
    holds(answer, k[:4], v[:4], capacity=4)


@check("keys without their values are refused")
def shapes(KVCache):
    _, k, v = tokens(3)
    raises(ValueError, new(KVCache, 5).append, 0, k, v[:1], hint=(
        "3 keys and 1 value are accepted: broadcasting copies the value three times, so compare "
        "the shapes"))


@check("keys and values have the dtype that was asked for")
def dtype(KVCache):
    _, k, v = (each.astype(np.float32) for each in tokens(2))
    keys, values = KVCache(CONFIG, 4, np.float32).append(0, k, v)
    equal([str(each.dtype) for each in (keys, values)], ["float32"] * 2, hint=(
        "the dtype is not used: arrays are float64 if nothing else is said, twice the memory"))


@check("append copies the new token, and not those before it", twin=False)  # NumPy's memory
def memory(KVCache):
    _, k, v = tokens(1)
    cache, held = new(KVCache, 4100), np.ones((4096, K, D))
    append(cache, 0, held, held)
    peak = peak_bytes(cache.append, 0, k, v)
    require(peak < held.nbytes / 4, f"far less than the {held.nbytes:,} bytes of all keys",
            f"{peak:,} bytes at the peak", "all keys are copied for every token, as np.concatenate "
            "does: allocate the whole capacity once, write one row, return a view")


# ── attend ───────────────────────────────────────────────────────────────────────────────────


@check("a prompt in one piece: every token sees itself and those before it")
def whole(KVCache):
    q, k, v = tokens(4)
    close(attend_all(new(KVCache, 6), q, k, v), loop(q, k, v), mistakes={
        "tokens see those after them": loop(q, k, v, last_key=lambda n: 4),
        "a token does not see itself: store its key first, then attend":
            loop_before(q, k, v),
        "attention goes over the whole capacity, and rows of zeros take part":
            loop(q, padded(k, 6), padded(v, 6)),
    }, hint="attention_np wants heads in front, [H, N, D], and the answer is [N, H, D] again")


@check("token by token is the same as all at once")
def one_by_one(KVCache):
    q, k, v = tokens(5)
    cache = new(KVCache, 5)
    got = np.concatenate([attend_all(cache, *(x[n : n + 1] for x in (q, k, v)))
                          for n in range(5)])
    close(got, loop(q, k, v), mistakes=piece_mistakes(q, k, v, [1] * 5))


@check("pieces of any length are the same as all at once")
def pieces(KVCache):
    q, k, v = tokens(9)
    cache, got = new(KVCache, 12), []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        got.append(attend_all(cache, *(x[start:end] for x in (q, k, v))))
    close(np.concatenate(got), loop(q, k, v), mistakes=piece_mistakes(q, k, v, (4, 1, 3, 1)))


# ── truncate ─────────────────────────────────────────────────────────────────────────────────


@check("after truncate, what was cut was never there")
def cut(KVCache):
    first, other = tokens(6, seed=1), tokens(3, seed=2)
    for kept in (4, 1, 0):
        cache = new(KVCache, 9)
        attend_all(cache, *first)
        cache.truncate(kept)
        equal(cache.length, kept, mistakes={
            "truncate changes nothing": 6, "truncate(n) removes n tokens, it is to keep n":
            6 - kept}, hint="length is what is left")
        q, k, v = (np.concatenate([a[:kept], b]) for a, b in zip(first, other))
        stale = [np.concatenate([a, b]) for a, b in zip(first, other)]
        close(attend_all(cache, *other), loop(q, k, v)[kept:], mistakes={
            "truncate changes `length` only: some layers still write behind the tokens that were "
            "cut": loop(*stale)[6:]})


@check("truncate(cache.length) repairs a pass that was broken off")
def repair(KVCache):
    q, k, v = tokens(5)
    cache = new(KVCache, 6)
    attend_all(cache, *(x[:4] for x in (q, k, v)))
    attend_all(cache, *(x[4:] for x in (q, k, v)), layers=range(2))  # the third never ran
    equal(cache.length, 4, hint="one layer holds 4 tokens, so 4 is what every layer has")
    cache.truncate(cache.length)
    for layer in range(L):
        keys, values = append(cache, layer, k[4:], v[4:])
        require(keys.shape[1] == 5, f"5 tokens in layer {layer}", f"{keys.shape[1]}",
                "truncate is to cut every layer, also if length says that there is nothing to do")
        holds((keys, values), k, v, capacity=6)


@check("truncate to what is not there is refused", hint=(
    "rows that were never written, or are not in every layer, would count as tokens"))
def refuses(KVCache):
    cache = new(KVCache, 6)
    attend_all(cache, *tokens(3))
    for wrong in (4, -1):
        raises(ValueError, cache.truncate, wrong)
        equal(cache.length, 3, hint="a refused truncate has changed the cache")
    append(cache, 0, *tokens(1)[1:])
    raises(ValueError, cache.truncate, 4)


# ── in the engine ────────────────────────────────────────────────────────────────────────────


@check("the engine writes with it what it would write without a cache")
def in_the_engine(KVCache):
    rng = np.random.default_rng(7)
    weights, prompt_token_ids = random_weights(rng), [3, 1, 4, 1, 5, 9, 2]
    with using(KVCache=KVCache):
        runner = Runner(weights)
        cache = runner.new_cache(12)
        logits = prefill(runner, prompt_token_ids, cache, chunk_size=3)
        request = Request(prompt_token_ids, SamplingParams(temperature=0), stop_token_ids=())
        for _ in range(2):  # two answers to one prompt, as with n=2
            cache.truncate(len(prompt_token_ids))
            token_ids, seen = list(prompt_token_ids), []
            steps = decode(runner, logits, cache, request, rng, CONFIG.vocab_size)
            for _, (token, of_token) in zip(range(5), steps):
                token_ids.append(token)
                seen.append(of_token)
            expected = runner.forward(token_ids[:-1], range(len(token_ids) - 1), NoCache())
            close(np.stack(seen), expected[len(prompt_token_ids) - 1 :], hint=(
                "the logits of a prompt in chunks of 3, then token by token, are not those of one "
                "pass over everything; the checks above say why"))


class Runner:
    """The engine's NumPy runner, on a random model in float64."""

    sample = staticmethod(sample_np)

    def __init__(self, weights):
        self.weights = weights

    def new_cache(self, capacity):
        return minillm.kv_cache.KVCache(self.weights.config, capacity, np.float64)

    def forward(self, token_ids, positions, cache, rows=None):
        return forward_np(self.weights, np.array(token_ids), np.array(positions), cache, rows)


class NoCache:
    """Keeps nothing: the whole text is in every pass."""

    def attend(self, layer, q, k, v):
        return loop(q, k, v)


def random_weights(rng):
    C, F = CONFIG.hidden_size, CONFIG.intermediate_size

    def dense(*shape):
        return Dense(rng.normal(size=shape) / math.sqrt(shape[1]))

    def norm():
        return rng.normal(1, 0.2, size=C)

    blocks = [LayerWeights(norm(), dense((H + 2 * K) * D, C), dense(C, H * D), norm(),
                           dense(F, C), dense(F, C), dense(C, F)) for _ in range(L)]
    return Weights(CONFIG, dense(CONFIG.vocab_size, C), blocks, norm(),
                   dense(CONFIG.vocab_size, C), 10000.0 ** (-np.arange(0, D, 2) / D))


# ── What the usual mistakes would return ─────────────────────────────────────────────────────


def piece_mistakes(q, k, v, lengths):
    """What comes out if a piece does not get what it should see."""
    ends = np.cumsum(lengths)
    spans = [(end - count, end) for count, end in zip(lengths, ends)]
    alone = [loop(*(x[start:end] for x in (q, k, v))) for start, end in spans]
    aligned = [loop(q[start:end], k[:end], v[:end], last_key=lambda n: n) for start, end in spans]
    return {
        "a piece attends to its own tokens alone: hand all keys and values to attention":
            np.concatenate(alone),
        "a piece's first token sees the first key alone: its tokens are the last of the S":
            np.concatenate(aligned),
        "a token does not see itself: store its key first, then attend": loop_before(q, k, v),
    }


def loop_before(q, k, v):
    """Attention to what was there before the token; NaN where nothing was."""
    out = np.full(q.shape, np.nan)
    for n in range(1, len(q)):
        out[n] = loop(q[n : n + 1], k[:n], v[:n])[0]
    return out


def padded(x, length):
    return np.concatenate([x, np.zeros((length - len(x), *x.shape[1:]))])

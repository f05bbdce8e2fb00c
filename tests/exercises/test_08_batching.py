"""Grader of chapter 08_batching. README.md in this folder tells how graders are written."""

from __future__ import annotations

import math

import numpy as np

from minillm.batching import PaddedCache
from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import as_array, check, close, equal, require
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np

# Pairwise different, so that no mixed-up axis passes.
L, H, K, D, V = 3, 6, 2, 4, 13
CONFIG = ModelConfig(vocab_size=V, hidden_size=10, intermediate_size=7, num_hidden_layers=L,
                     num_attention_heads=H, num_key_value_heads=K, head_dim=D)
PROMPTS = ([3, 1, 4], [1], [5, 9, 2, 6, 5], [8, 0], [7, 7, 7, 7])
BESIDE = "an answer must not depend on what runs beside it; the checks above say why"
LEFT = ("padding stands behind the prompts; it is to stand in front, so that all prompts end in "
        "one column")
COLUMNS = ("the positions are those of the columns; a prompt's own tokens begin at 0, whatever "
           "stands in front of them")


# ── pad_batch ────────────────────────────────────────────────────────────────────────────────


def padded(pad_batch, prompts, **options):
    """pad_batch's answer as three arrays, which are checked to be arrays of int."""
    answer = pad_batch(prompts, **options)
    require(isinstance(answer, (tuple, list)) and len(answer) == 3,
            "tokens, positions, num_padding: three arrays", f"a {type(answer).__name__}",
            "pad_batch ends in `return tokens, positions, num_padding`")
    for name, array in zip(("tokens", "positions", "num_padding"), answer):
        require(isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.integer),
                f"{name} as an array of int",
                f"an array of {array.dtype}" if isinstance(array, np.ndarray)
                else f"a {type(array).__name__}",
                "np.zeros makes floats unless it is told dtype=np.int64, and a list is no array: "
                "the model looks tokens up by them")
    return answer


def rectangle(prompts, pad_token_id=0):
    """The right answer, number by number."""
    T = max(len(prompt) for prompt in prompts)
    tokens = [[pad_token_id] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    positions = [[0] * (T - len(prompt)) + list(range(len(prompt))) for prompt in prompts]
    return tokens, positions, [T - len(prompt) for prompt in prompts]


@check("prompts of one length need no padding")
def one_length(pad_batch):
    tokens, positions, num_padding = padded(pad_batch, [[7, 8, 9], [4, 5, 6]])
    equal(tokens, [[7, 8, 9], [4, 5, 6]], hint="a row a prompt, in their order")
    equal(positions, [[0, 1, 2], [0, 1, 2]], mistakes={
        "positions begin at 1; the first token of a text is at 0": [[1, 2, 3], [1, 2, 3]],
        "positions go on from one prompt to the next: each is a text of its own":
            [[0, 1, 2], [3, 4, 5]]})
    equal(num_padding, [0, 0], mistakes={
        "num_padding counts the prompts' own tokens, not what is in front of them": [3, 3]})


@check("shorter prompts are filled up on the left", hint=LEFT)
def left(pad_batch):
    tokens, _, _ = padded(pad_batch, [[7, 8, 9], [5], [3, 4]])
    equal(tokens, [[7, 8, 9], [0, 0, 5], [0, 3, 4]], mistakes={
        LEFT: [[7, 8, 9], [5, 0, 0], [3, 4, 0]],
        "prompts are cut to the shortest": [[9], [5], [4]],
        "a short prompt stands behind its padding in reverse": [[9, 8, 7], [0, 0, 5], [0, 4, 3]]})


@check("a prompt's own tokens have the positions that they would have alone")
def positions_alone(pad_batch):
    _, positions, _ = padded(pad_batch, [[7, 8, 9, 6], [5, 4]])
    equal(positions, [[0, 1, 2, 3], [0, 0, 0, 1]], mistakes={
        COLUMNS: [[0, 1, 2, 3]] * 2,
        "padding has positions below 0; it is to have position 0":
            [[0, 1, 2, 3], [-2, -1, 0, 1]],
        "padding counts positions as well, from its own 0": [[0, 1, 2, 3], [0, 1, 0, 1]],
        "positions stand as if padding were behind the prompt": [[0, 1, 2, 3], [0, 1, 0, 0]],
        "positions begin at 1; the first token of a text is at 0": [[1, 2, 3, 4], [0, 0, 1, 2]]})


@check("num_padding counts the padding of each row")
def counts(pad_batch):
    _, _, num_padding = padded(pad_batch, [[7], [8, 9, 1, 2], [5, 6]])
    equal(num_padding, [3, 0, 2], mistakes={
        "num_padding counts the prompts' own tokens, not what is in front of them": [1, 4, 2],
        "num_padding counts the padding of all rows together": 5})


@check("pad_token_id is what the rectangle is filled with, and may be a word of a prompt", hint=(
    "a token with the number pad_token_id can be a prompt's own: count padding by the lengths, "
    "not by looking for it"))
def pad_token(pad_batch):
    prompts = [[0, 4, 0], [0], [6, 0]]
    for pad_token_id in (0, 4, 2):
        answer = padded(pad_batch, prompts, pad_token_id=pad_token_id)
        for got, expected in zip(answer, rectangle(prompts, pad_token_id)):
            equal(got, expected, mistakes={
                "pad_token_id is not used, padding is always 0": rectangle(prompts)[0]})


@check("one prompt alone, and prompts of many lengths")
def many_lengths(pad_batch):
    rng = np.random.default_rng(3)
    for B in (1, 2, 5, 9):
        prompts = [rng.integers(0, 50, size=rng.integers(1, 12)).tolist() for _ in range(B)]
        for name, got, expected in zip(("tokens", "positions", "num_padding"),
                                       padded(pad_batch, prompts), rectangle(prompts)):
            equal(got, expected, hint=f"{name} of the prompts {prompts}")


@check("a model that reads the rectangle says of each prompt what it says of it alone", hint=BESIDE)
def prompts_in_the_engine(pad_batch):
    weights = random_weights()
    tokens, positions, num_padding = padded(pad_batch, PROMPTS)
    cache = LoopCache(num_padding)
    logits = forward_np(weights, tokens.ravel(), positions.ravel(), cache)
    last = logits.reshape(*tokens.shape, V)[:, -1]
    close(last, [alone(weights, prompt) for prompt in PROMPTS])


# ── masked_attention_np ──────────────────────────────────────────────────────────────────────


def loop(q, k, v, visible, scale=None, head_of=None):
    """Attention of a batch as plain loops over float64 numbers; the options make mistakes."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    head_of = head_of or (lambda h: h // (H // K))
    out = np.zeros((B, H, T, D))
    for b in range(B):
        for h in range(H):
            keys, values = k[b, head_of(h)], v[b, head_of(h)]
            for t in range(T):
                seen = [s for s in range(S) if visible[b, t, s]]
                scores = [scale * sum(float(q[b, h, t, d]) * float(keys[s, d]) for d in range(D))
                          for s in seen]
                weights = [math.exp(score - max(scores)) for score in scores]
                for s, weight in zip(seen, weights):
                    out[b, h, t] += weight / sum(weights) * values[s].astype(np.float64)
    return out


def random_qkv(B, H, K, T, S, D, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in ((B, H, T, D), (B, K, S, D), (B, K, S, D))]


def random_mask(B, T, S, seed=0):
    """Everybody sees something: a random mask, and one key more."""
    rng = np.random.default_rng(seed)
    visible = rng.random((B, T, S)) < 0.4
    np.put_along_axis(visible, rng.integers(S, size=(B, T, 1)), True, axis=2)
    return visible


def mask_mistakes(q, k, v, visible):
    """What comes out if the mask is not applied, or applied wrongly."""
    scores = np.einsum("bhtd,bhsd->bhts", q, repeated(k, q)) / math.sqrt(q.shape[-1])
    shown, values = visible[:, None], repeated(v, q)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return {
        "the mask is not applied: every query sees every key": loop(q, k, v,
                                                                    np.ones_like(visible)),
        "hidden keys get the score 0, which has a weight too; −∞ has none":
            softmax(np.where(shown, scores, 0)) @ values,
        "the weights were made before the mask, and no longer add up to 1: mask the scores":
            np.where(shown, weights / weights.sum(axis=-1, keepdims=True), 0) @ values,
        "every sequence gets the mask of the first one":
            loop(q, k, v, np.broadcast_to(visible[:1], visible.shape)),
        "the scores are not divided by √D": loop(q, k, v, visible, scale=1.0),
    }


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def repeated(x, q):
    """A key/value head for every query head."""
    return np.repeat(x, q.shape[1] // x.shape[1], axis=1)


@check("one sequence whose query sees everything: plain attention")
def everything(masked_attention_np):
    q, k, v = random_qkv(B=1, H=1, K=1, T=1, S=5, D=4)
    visible = np.ones((1, 1, 5), dtype=bool)
    close(masked_attention_np(q, k, v, visible), loop(q, k, v, visible), mistakes={
        "the scores are not divided by √D": loop(q, k, v, visible, scale=1.0),
        "the scores are divided by D, not by its root": loop(q, k, v, visible, scale=1 / 4),
    })


@check("keys that a query does not see count for nothing")
def hidden(masked_attention_np):
    q, k, v = random_qkv(B=1, H=1, K=1, T=1, S=5, D=4)
    visible = np.array([[[False, True, False, True, True]]])
    close(masked_attention_np(q, k, v, visible), loop(q, k, v, visible),
          mistakes={"the mask is upside down: True means that a key is seen":
                    loop(q, k, v, ~visible), **mask_mistakes(q, k, v, visible)})


@check("every sequence has its own mask and its own keys")
def own_mask(masked_attention_np):
    q, k, v = random_qkv(B=3, H=1, K=1, T=1, S=5, D=4)
    visible = np.arange(5) >= np.array([2, 0, 4])[:, None, None]  # padding in front
    close(masked_attention_np(q, k, v, visible), loop(q, k, v, visible),
          mistakes={"every sequence reads the keys of the first one":
                    loop(q, first_only(k), first_only(v), visible),
                    **mask_mistakes(q, k, v, visible)})


@check("every query has its own row of the mask")
def own_row(masked_attention_np):
    q, k, v = random_qkv(B=2, H=1, K=1, T=3, S=7, D=4)
    visible = random_mask(B=2, T=3, S=7)
    close(masked_attention_np(q, k, v, visible), loop(q, k, v, visible), mistakes={
        "every query gets the mask of the last one":
            loop(q, k, v, np.broadcast_to(visible[:, -1:], visible.shape)),
        **mask_mistakes(q, k, v, visible)})


@check("query heads share key/value heads, neighbours together")
def grouped(masked_attention_np):
    q, k, v = random_qkv(B=3, H=6, K=2, T=4, S=7, D=5)
    visible = random_mask(B=3, T=4, S=7)
    close(masked_attention_np(q, k, v, visible), loop(q, k, v, visible), mistakes={
        "query head h belongs to key/value head h // (H/K), not to h % K":
            loop(q, k, v, visible, head_of=lambda h: h % 2),
        "every query head reads the first key/value head":
            loop(q, k, v, visible, head_of=lambda h: 0),
        **mask_mistakes(q, k, v, visible)},
        hint="H/K query heads use one key/value head: repeat that head, or see its queries as more "
             "rows, and give each row the mask of its query")


@check("a hidden key's large score does not drown those that are seen", hint=(
    "whatever stands in padding must not matter: mask the scores first, and take the largest of "
    "those that are left before exp"))
def drowned(masked_attention_np):
    q, k, v = random_qkv(B=2, H=2, K=1, T=1, S=4, D=3)
    k[:, :, 0] = 1e5 * np.sign(q[:, :1, 0])
    visible = np.tile(np.arange(4) > 0, (2, 1, 1))
    close(masked_attention_np(q, k, v, visible), loop(q, k, v, visible))


@check("large scores do not overflow", hint=(
    "subtract the largest score before exp: softmax does not change, and exp cannot overflow"))
def overflow(masked_attention_np):
    q, k, v = random_qkv(B=2, H=2, K=1, T=3, S=4, D=5)
    visible = random_mask(B=2, T=3, S=4)
    close(masked_attention_np(1000 * q, k, v, visible), loop(1000 * q, k, v, visible))


@check("the answer has the dtype of q")
def same_dtype(masked_attention_np):
    q, k, v = (each.astype(np.float32) for each in random_qkv(B=2, H=2, K=1, T=3, S=4, D=5))
    out = masked_attention_np(q, k, v, random_mask(B=2, T=3, S=4))
    require(out is not None, "an array", "None", "is a `return` missing?")
    equal(str(out.dtype), "float32", hint=(
        "np.sqrt(D) and np.zeros are float64: use math.sqrt, and dtype=q.dtype. All layers after "
        "this one would go on in float64"))


@check("in a padded batch every sequence gets what it gets alone", hint=BESIDE)
def attention_in_the_engine(masked_attention_np):
    weights, (tokens, positions, num_padding) = random_weights(), rectangle(PROMPTS)
    with using(masked_attention_np=masked_attention_np):
        cache = PaddedCache(CONFIG, np.array(num_padding), 9, np.float64)
        logits = forward_np(weights, np.ravel(tokens), np.ravel(positions), cache)
        last = logits.reshape(len(PROMPTS), -1, V)[:, -1]
        close(last, [alone(weights, prompt) for prompt in PROMPTS])
        after = forward_np(weights, np.array([2, 4, 6, 8, 10]),
                           np.array([len(prompt) for prompt in PROMPTS]), cache)
    close(after, [alone(weights, [*prompt, token])
                  for prompt, token in zip(PROMPTS, (2, 4, 6, 8, 10))])


# ── decode_batch ─────────────────────────────────────────────────────────────────────────────


class Script:
    """Answers that are known before: row r's token n is 10·r + n, and it has `lengths[r]` of them.

    Logits name the pass and the row that they come from, and pick looks whose it was handed.
    """

    def __init__(self, *lengths):
        self.lengths = lengths
        self.calls, self.picks = [], []
        self.num_picked = [0] * len(lengths)

    def run(self, decode_batch, positions):
        self.positions = positions
        return decode_batch(self.forward, self.logits(0), list(positions), self.pick)

    def logits(self, number):
        return np.array([[number, row] for row in range(len(self.lengths))], dtype=np.float64)

    def forward(self, tokens, positions):
        if len(self.calls) > sum(self.lengths) + 3:
            require(False, f"{max(self.lengths) - 1} calls of forward", "calls without end",
                    "stop when every row has finished")
        self.calls.append((list(map(int, tokens)), list(map(int, positions))))
        return self.logits(len(self.calls))

    def pick(self, row, logits):
        require(self.num_picked[row] < self.lengths[row], "no more picks for a finished row",
                f"one for row {row} after its last token", "remember which rows have finished, and "
                "do not ask for their next token: it would end up in the answer")
        self.picks.append((int(row), as_array(logits, "a row of logits [V]").tolist()))
        self.num_picked[row] += 1
        return 10 * row + self.num_picked[row] - 1, self.num_picked[row] == self.lengths[row]

    def right_calls(self):
        """What forward is to be called with."""
        return [([10 * row + min(n, length - 1) for row, length in enumerate(self.lengths)],
                 [position + n for position in self.positions])
                for n in range(max(self.lengths) - 1)]


@check("the tokens that were picked go through the model, at the positions given")
def one_pass(decode_batch):
    script = Script(2, 2, 2)
    script.run(decode_batch, (5, 3, 7))
    require(script.calls, "a call of forward", "none", "the first tokens are drawn from the logits "
            "that you are handed; the second ones need a pass")
    equal(script.calls[0], ([0, 10, 20], [5, 3, 7]), mistakes={
        "the first pass is one position too far: `positions` are those of the next tokens already":
            ([0, 10, 20], [6, 4, 8]),
        "all rows get the position of the longest one": ([0, 10, 20], [7, 7, 7]),
        "all rows get the position of the first one": ([0, 10, 20], [5, 5, 5]),
        "nothing was picked before the first pass": ([0, 0, 0], [5, 3, 7]),
        "a pass takes one row alone: all rows go through together": ([0], [5])},
        hint="forward takes B tokens and B positions")


@check("with every pass each row moves on by one position")
def moves_on(decode_batch):
    script = Script(4, 4)
    script.run(decode_batch, (2, 6))
    right = script.right_calls()
    equal(script.calls, right, mistakes={
        "the positions stay what they were: the next token stands one further":
            [(tokens, [2, 6]) for tokens, _ in right],
        "one pass too many: after the last tokens nobody needs logits":
            [*right, ([3, 13], [5, 9])]})


@check("each row is handed its own logits, of the pass before")
def own_logits(decode_batch):
    script = Script(3, 3)
    script.run(decode_batch, (1, 4))
    expected = [(row, [number, row]) for number in range(3) for row in range(2)]
    equal(script.picks, expected, mistakes={
        "the logits are always those of the prompts: each pass brings new ones":
            [(row, [0, row]) for _, (_, row) in expected],
        "every row gets the logits of the first row":
            [(row, [number, 0]) for _, (number, row) in expected]},
        hint="pick(row, logits[row]) for every row, rows in order, before each pass")


@check("a row that has finished is computed on: its last token, at its next position")
def keeps_its_shape(decode_batch):
    script = Script(1, 4, 2)
    script.run(decode_batch, (3, 8, 1))
    right = script.right_calls()
    for tokens, _ in script.calls:
        require(len(tokens) == 3, "3 rows in every pass", f"{len(tokens)}",
                "rows that have finished are left out of the pass: the cache has keys of all of "
                "them, and the batch is to keep its shape")
    require(len(script.calls) >= 3, "3 calls of forward, for the row with 4 tokens",
            f"{len(script.calls)}", "the batch ends with the last row that finishes, not with the "
            "first one")
    equal(script.calls, right, mistakes={
        "a finished row is fed 0; it is to be fed its last token again":
            [([token if n < length else 0 for token, length in zip(tokens, script.lengths)],
              positions) for n, (tokens, positions) in enumerate(right)],
        "a finished row stands still; the cache has a column for it in every pass, and its "
        "position moves on": [(tokens, [position + min(n, length - 1) for position, length
                                        in zip((3, 8, 1), script.lengths)])
                              for n, (tokens, _) in enumerate(right)]},
        hint="feed a finished row its last token again, at its next position")


@check("nobody is asked for a token after it has finished, and everybody until then")
def until_the_last(decode_batch):
    for lengths in ((1, 5), (5, 1), (2, 3, 2), (4,)):
        script = Script(*lengths)
        script.run(decode_batch, (2,) * len(lengths))
        equal(script.num_picked, lengths, hint=(
            f"answers of {', '.join(map(str, lengths))} tokens: go on until the last row has "
            "finished, and pick for every row that has not"))


@check("the number of passes is returned, and none is made that nobody needs")
def num_passes(decode_batch):
    for lengths in ((3, 1, 5), (2, 2), (1, 1, 1)):
        script = Script(*lengths)
        answer = script.run(decode_batch, (4,) * len(lengths))
        passes = max(lengths) - 1
        equal(len(script.calls), passes, mistakes={
            "one pass too many: after the last tokens nobody needs logits": passes + 1,
            "a pass for every row; all of them go through together": sum(lengths) - len(lengths)})
        equal(answer, passes, mistakes={
            "the tokens of the longest answer are returned; its first one took no pass":
                passes + 1,
            "the tokens of all answers are returned, not the passes": sum(lengths)},
            hint="return how often forward was called")


@check("answers of a batch are those that the prompts get alone", hint=BESIDE)
def answers_in_the_engine(decode_batch):
    weights, lengths = random_weights(), (4, 2, 5, 1, 3)
    tokens, positions, num_padding = rectangle(PROMPTS)
    cache, answers = LoopCache(num_padding), [[] for _ in PROMPTS]

    def pick(row, logits):
        answers[row].append(int(logits.argmax()))
        return answers[row][-1], len(answers[row]) == lengths[row]

    first = forward_np(weights, np.ravel(tokens), np.ravel(positions), cache)
    first = first.reshape(len(PROMPTS), -1, V)[:, -1]
    decode_batch(lambda tokens, positions: forward_np(weights, np.array(tokens),
                                                      np.array(positions), cache),
                 first, [len(prompt) for prompt in PROMPTS], pick)
    equal(answers, [greedy(weights, prompt, length)
                    for prompt, length in zip(PROMPTS, lengths)])


# ── all three ────────────────────────────────────────────────────────────────────────────────


@check("your batch, your attention and your loop together answer as each prompt alone", hint=BESIDE)
def together(pad_batch, masked_attention_np, decode_batch):
    weights, lengths = random_weights(seed=5), (2, 6, 1, 4, 3)
    tokens, positions, num_padding = padded(pad_batch, PROMPTS)
    answers = [[] for _ in PROMPTS]

    def pick(row, logits):
        answers[row].append(int(logits.argmax()))
        return answers[row][-1], len(answers[row]) == lengths[row]

    with using(masked_attention_np=masked_attention_np):
        cache = PaddedCache(CONFIG, num_padding, tokens.shape[1] + max(lengths), np.float64)
        first = forward_np(weights, tokens.ravel(), positions.ravel(), cache)
        first = first.reshape(*tokens.shape, V)[:, -1]
        decode_batch(lambda tokens, positions: forward_np(weights, np.array(tokens),
                                                          np.array(positions), cache),
                     first, [len(prompt) for prompt in PROMPTS], pick)
    equal(answers, [greedy(weights, prompt, length)
                    for prompt, length in zip(PROMPTS, lengths)])


# ── a small model, and caches that are loops ─────────────────────────────────────────────────


class LoopCache:
    """The padded batch's keys and values as lists; each sequence attends by the loop above."""

    def __init__(self, num_padding):
        self.num_padding = num_padding
        self.columns = [[] for _ in range(L)]  # of a layer: k, v [B, K, D], column by column

    def attend(self, layer, q, k, v):
        B = len(self.num_padding)
        q, k, v = (each.reshape(B, -1, *each.shape[1:]) for each in (q, k, v))  # [B, T, heads, D]
        T, columns = q.shape[1], self.columns[layer]
        columns += [(k[:, t], v[:, t]) for t in range(T)]
        keys, values = (np.stack(each, axis=2) for each in zip(*columns))  # [B, K, S, D]
        S = len(columns)
        visible = np.zeros((B, T, S), dtype=bool)
        for b in range(B):
            for t in range(T):
                own = S - T + t
                visible[b, t, min(int(self.num_padding[b]), own) : own + 1] = True
        return loop(q.swapaxes(1, 2), keys, values, visible).swapaxes(1, 2).reshape(B * T, H, D)


def alone(weights, token_ids):
    """Logits [V] after these tokens, in one pass, with nobody beside them."""
    positions = np.arange(len(token_ids))
    return forward_np(weights, np.array(token_ids), positions, LoopCache([0]))[-1]


def greedy(weights, prompt, num_tokens):
    """The best token, so many times. The best two of these models are never close."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        logits = alone(weights, token_ids)
        assert np.diff(np.sort(logits)[-2:])[0] > 1e-4, "take another seed"
        token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt):]


def random_weights(seed=7):
    rng = np.random.default_rng(seed)
    C, F = CONFIG.hidden_size, CONFIG.intermediate_size

    def dense(*shape):
        return Dense(rng.normal(size=shape) / math.sqrt(shape[1]))

    def norm():
        return rng.normal(1, 0.2, size=C)

    blocks = [LayerWeights(norm(), dense((H + 2 * K) * D, C), dense(C, H * D), norm(),
                           dense(F, C), dense(F, C), dense(C, F)) for _ in range(L)]
    return Weights(CONFIG, dense(V, C), blocks, norm(), dense(V, C),
                   10000.0 ** (-np.arange(0, D, 2) / D))


def first_only(x):
    return np.broadcast_to(x[:1], x.shape)

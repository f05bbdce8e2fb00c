"""Grader of chapter 06_sampling. README.md in this folder tells how graders are written.

Nothing is left to luck: the numbers u are given, and a distribution is told by a grid of them.
"""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np

from minillm import SamplingParams
from minillm.course import using
from minillm.course.check import check, close, equal, raises, require
from minillm.generate import decode
from minillm.model_runner import NumpyRunner
from minillm.sampling import probabilities_np, request_rng

NO = -math.inf
FRESH = "what is removed becomes −∞, in a new array; what is kept stays as it was"
REMOVED = "what is removed has to become −∞: 0 is an ordinary logit, and a fair chance"
OVERFLOW = ("if this is the only check that fails, exp(1000) overflows: take the largest logit off "
            "first, as softmax_np does")
PLUGGED = "these are the probabilities that the engine draws from, with your function in it"


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def only(logits, kept, removed=NO):
    return [x if i in kept else removed for i, x in enumerate(logits)]


def best_first(logits):
    """Ids, the best first, of equals the lower."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def top_k(logits, k):
    edge = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    return only(logits, [i for i, x in enumerate(logits) if x >= edge])


def nucleus(logits, top_p):
    probs, kept, total = softmax(logits), [], 0.0
    for i in best_first(logits):
        if kept and total >= top_p - 1e-9:
            break
        kept.append(i)
        total += probs[i]
    return kept


def top_p(logits, p):
    return only(logits, nucleus(logits, p))


def min_p(logits, p):
    probs = softmax(logits)
    return only(logits, [i for i, x in enumerate(probs) if x >= p * max(probs) * (1 - 1e-12)])


def distribution(logits, params, steps=("min_p", "top_k", "top_p"), temperature_first=True):
    """Probabilities as vLLM's order of steps gives them; the options make the usual mistakes."""
    temperature = params.temperature
    x = [float(z) / (temperature if temperature_first else 1) for z in logits]
    for step in steps:
        if step == "min_p" and params.min_p > 0:
            x = min_p(x, params.min_p)
        if step == "top_k" and params.top_k > 0:
            x = top_k(x, params.top_k)
        if step == "top_p" and params.top_p < 1:
            x = top_p(x, params.top_p)
    return softmax([z / (1 if temperature_first else temperature) for z in x])


def drawn(probs, u):
    """The first id at which the running sum of probs exceeds u."""
    total = 0.0
    for i, prob in enumerate(probs):
        total += prob
        if total > u:
            return i
    return max(i for i, prob in enumerate(probs) if prob > 0)


def random_logits(size, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, size)


# ── top_k_np ─────────────────────────────────────────────────────────────────────────────────


@check("the k largest stay, the others become −∞", hint=FRESH)
def k_largest(top_k_np):
    logits = random_logits(9)
    for k in (1, 3, 8):
        order = best_first(logits)
        close(top_k_np(logits, k), top_k(logits, k), mistakes={
            REMOVED: only(logits, order[:k], removed=0.0),
            "the k smallest stay instead of the largest": only(logits, order[-k:]),
            "one token too few: the k-th largest itself stays": only(logits, order[: k - 1]),
            "one token too many stays": only(logits, order[: k + 1]),
            "the k largest are removed, not kept": only(logits, order[k:]),
            "the probabilities come back: logits are asked for": softmax(top_k(logits, k)),
        })


@check("tokens that equal the k-th stay too")
def k_ties(top_k_np):
    logits = np.array([1.0, 2.0, 5.0, 2.0, 2.0, 0.0])
    close(top_k_np(logits, 2), top_k(logits, 2), hint=(
        "of the tokens that equal the k-th only some stay: compare values with the k-th largest, "
        "do not count tokens"))


@check("a k beyond the vocabulary keeps everything", hint=(
    "k can be larger than V: min(k, len(logits))"))
def k_too_large(top_k_np):
    logits = random_logits(5)
    close(top_k_np(logits, 5), logits)
    close(top_k_np(logits, 50), logits)


@check("tokens that an earlier step removed stay removed")
def k_removed(top_k_np):
    logits = np.array([NO, 1.0, NO, 3.0, NO, NO])
    for k in (1, 2, 4):
        close(top_k_np(logits, k), top_k(logits, k), hint="−∞ is removed already")


@check("the engine draws from what it leaves")
def k_in_the_engine(top_k_np):
    logits, params = random_logits(12), SamplingParams(top_k=4, temperature=0.7)
    with using(top_k_np=top_k_np):
        close(probabilities_np(logits, params), distribution(logits, params), hint=PLUGGED)


# ── top_p_np ─────────────────────────────────────────────────────────────────────────────────

SPREAD = np.log([0.05, 0.4, 0.1, 0.25, 0.2])  # not in order of size


def nucleus_mistakes(logits, p):
    order, probs = best_first(logits), softmax(logits)
    kept, size = nucleus(logits, p), len(nucleus(logits, p))
    sums = np.cumsum([probs[i] for i in order])
    return {
        "the token with which the sum reaches top_p belongs to the nucleus too":
            only(logits, order[: size - 1]),
        "one token too many: the sum has reached top_p before it": only(logits, order[: size + 1]),
        "what was decided in order of size is applied in order of ids: take the mask back to the "
        "tokens it is about": only(logits, range(size)),
        "the sum starts at the least likely token, not at the most likely":
            only(logits, reached_from(order[::-1], probs, p)),
        "top_p is a bound for the sum of probabilities, not for each of them":
            only(logits, [i for i, prob in enumerate(probs) if prob >= p]),
        "each probability is compared with 1 − top_p, not their sum":
            only(logits, [i for i, prob in enumerate(probs) if prob >= 1 - p]),
        "logits are summed, not probabilities: softmax comes first":
            only(logits, reached_from(order, logits, p)),
        REMOVED: only(logits, kept, removed=0.0),
        "the probabilities come back: logits are asked for":
            [prob if i in kept else 0.0 for i, prob in enumerate(probs)],
        "the probabilities come back, summed to 1: logits are asked for":
            softmax(top_p(logits, p)),
        "the running sum comes back: logits are asked for": sums,
    }


def reached_from(order, addends, bound):
    """The tokens that stay if addends are summed up in this order until bound is reached."""
    sums = np.cumsum([addends[i] for i in order])
    return [i for rank, i in enumerate(order) if rank == 0 or sums[rank - 1] < bound]


@check("the fewest tokens whose probabilities reach top_p stay", hint=FRESH)
def p_nucleus(top_p_np):
    for p in (0.3, 0.6, 0.8, 0.92):
        close(top_p_np(SPREAD, p), top_p(SPREAD, p), mistakes=nucleus_mistakes(SPREAD, p))
    logits = random_logits(40, seed=3)
    for p in (0.5, 0.9, 0.99):
        close(top_p_np(logits, p), top_p(logits, p), mistakes=nucleus_mistakes(logits, p))


@check("the best token stays, however small top_p is", hint=(
    "nothing may be left empty: the first token of the nucleus stays whatever its probability"))
def p_at_least_one(top_p_np):
    for p in (0.05, 1e-12):
        close(top_p_np(SPREAD, p), only(SPREAD, [1]))


@check("of equal tokens the lower ids stay")
def p_ties(top_p_np):
    logits = np.array([1.0, 3.0, 1.0, 1.0, 3.0, 1.0])
    for p, kept in ((0.2, [1]), (0.6, [1, 4]), (0.82, [1, 4, 0])):
        close(top_p_np(logits, p), only(logits, kept), mistakes={
            "equal tokens stay all together: only as many stay as the sum needs":
                only(logits, [i for i in range(6) if logits[i] >= logits[kept[-1]]]),
            "of equal tokens the higher ids stay: sort so that equals keep their order":
                only(logits, sorted(range(6), key=lambda i: (-logits[i], -i))[: len(kept)]),
        }, hint="as many as the sum needs, and of equals the lower ids")


@check("large logits do not overflow", hint=OVERFLOW)
def p_overflow(top_p_np):
    logits = np.array([1000.0, 1001.0, 999.0, -1000.0])
    close(top_p_np(logits, 0.8), top_p(logits, 0.8))


@check("tokens that an earlier step removed stay removed")
def p_removed(top_p_np):
    logits = np.array([NO, 1.0, NO, 3.0, 0.5, NO])
    for p in (0.3, 0.9, 0.999):
        close(top_p_np(logits, p), top_p(logits, p), hint="−∞ is removed already: probability 0")


@check("the engine draws from what it leaves")
def p_in_the_engine(top_p_np):
    logits, params = random_logits(12), SamplingParams(top_p=0.75, temperature=1.6)
    with using(top_p_np=top_p_np):
        close(probabilities_np(logits, params), distribution(logits, params), hint=PLUGGED)


# ── min_p_np ─────────────────────────────────────────────────────────────────────────────────


@check("tokens at least min_p times as likely as the best stay", hint=FRESH)
def min_p_relative(min_p_np):
    flat = np.log(np.arange(1.0, 11.0)[::-1] / 55)  # no token as likely as 0.25
    for logits, p in ((flat + 5, 0.25), (flat, 0.25), (flat, 0.75), (SPREAD, 0.3), (SPREAD, 0.55)):
        probs = softmax(logits)
        kept = [i for i, x in enumerate(min_p(logits, p)) if x > NO]
        close(min_p_np(logits, p), min_p(logits, p), mistakes={
            "min_p is taken as a probability: it is a share of the best one's":
                only(logits, [i for i, prob in enumerate(probs) if prob >= p]),
            "logits are compared, not probabilities: p ≥ min_p·p_best is logit ≥ best + ln(min_p)":
                only(logits, [i for i, x in enumerate(logits) if x >= p * max(logits)]),
            "min_p is taken off the best logit: it is ln(min_p) that is added":
                only(logits, [i for i, x in enumerate(logits) if x >= max(logits) - p]),
            "the tokens that should go are those that stay":
                only(logits, [i for i in range(len(logits)) if i not in kept]),
            REMOVED: only(logits, kept, removed=0.0),
            "the probabilities come back: logits are asked for":
                [prob if i in kept else 0.0 for i, prob in enumerate(probs)],
        })


@check("min_p=1 keeps the best token, and all that equal it")
def min_p_one(min_p_np):
    logits = np.array([1.0, 4.0, 2.0, 4.0])
    close(min_p_np(logits, 1.0), only(logits, [1, 3]), mistakes={
        "the tokens right on the edge go: at least min_p times the best means ≥": [NO] * 4,
        "of equal tokens only one stays: compare values": only(logits, [1]),
    })


@check("large logits do not overflow", hint=OVERFLOW)
def min_p_overflow(min_p_np):
    logits = np.array([1000.0, 1001.0, 999.0, -1000.0])
    close(min_p_np(logits, 0.3), min_p(logits, 0.3))


@check("tokens that an earlier step removed stay removed")
def min_p_removed(min_p_np):
    logits = np.array([NO, 1.0, NO, 3.0, 2.5])
    close(min_p_np(logits, 0.5), min_p(logits, 0.5), hint="−∞ is removed already: probability 0")


@check("the engine draws from what it leaves")
def min_p_in_the_engine(min_p_np):
    logits, params = random_logits(12), SamplingParams(min_p=0.2, temperature=1.6)
    with using(min_p_np=min_p_np):
        close(probabilities_np(logits, params), distribution(logits, params), hint=PLUGGED)


# ── sample_np ────────────────────────────────────────────────────────────────────────────────

LATE = "process_logits_np comes before the choice of the best token: penalties count there too"
U_ALONE = "u is all the randomness there is: draw_np(probs, u), and no generator of your own"
LAST_U = math.nextafter(1.0, 0.0)


def truncations():
    """The grader's own top_k, top_p and min_p in the engine, so that these checks are about
    sample_np alone."""
    def on_arrays(function):
        return lambda logits, bound: np.array(function(logits.tolist(), bound))

    def on_tensors(function):
        return lambda logits, bound: logits.new_tensor(function(logits.tolist(), bound))

    forms = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    return using(**{f"{name}_np": on_arrays(form) for name, form in forms.items()},
                 **{f"{name}_torch": on_tensors(form) for name, form in forms.items()})


@check("temperature 0 takes the best token, whatever u is", hint=(
    "params.is_greedy: return the argmax before anything is divided by the temperature"))
def greedy(sample_np):
    logits = np.array([0.5, 2.0, -1.0, 2.0, 1.0])
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1e-7, top_k=3)):
        for u in (0.0, LAST_U):
            equal(sample_np(logits, params, u), 1, mistakes={
                "of equal tokens the lowest id is taken": 3, "the least likely token is taken": 2})


@check("penalties and biases come before the greedy choice")
def greedy_after_penalties(sample_np):
    logits = np.array([3.0, 2.5, 2.0, 0.5])
    equal(sample_np(logits, SamplingParams(temperature=0, logit_bias={2: 5.0}), 0.5), 2,
          mistakes={LATE: 0})
    penalized = SamplingParams(temperature=0, repetition_penalty=2.0)
    equal(sample_np(logits, penalized, 0.5, [0], [1]), 2, mistakes={
        LATE: 0, "repetition_penalty looks at the prompt and at the output": 1})


@check("presence and frequency penalties look at the output alone")
def output_alone(sample_np):
    logits = np.array([3.0, 2.0, 1.0])
    params = SamplingParams(temperature=0, frequency_penalty=0.8)
    equal(sample_np(logits, params, 0.5, [0, 0, 0, 0], [1]), 0, mistakes={
        "the tokens of the prompt are penalized: are prompt_token_ids in the place of "
        "output_token_ids?": 1})
    equal(sample_np(logits, params, 0.5, [1], [0, 0]), 1,
          hint="a token that the output has twice is penalized twice", mistakes={
              "the tokens of the output are not penalized: are output_token_ids handed on?": 0})


@check("min_tokens forbids the tokens that end a text")
def min_tokens(sample_np):
    logits, params = np.array([1.0, 5.0, 3.0]), SamplingParams(temperature=0, min_tokens=2)
    equal(sample_np(logits, params, 0.5, [0], [2], [1]), 2, mistakes={
        "the text ends too early: stop_token_ids are handed to process_logits_np too": 1})
    equal(sample_np(logits, params, 0.5, [0], [2, 2], [1]), 1, mistakes={
        "the end is forbidden although the output has min_tokens tokens: are prompt_token_ids in "
        "the place of output_token_ids?": 2})


@check("the same u gives the same token", hint=U_ALONE)
def u_decides(sample_np):
    logits, params = np.zeros(50), SamplingParams()
    for u in (0.0, 0.37, LAST_U):
        tokens = [int(sample_np(logits, params, u)) for _ in range(12)]
        require(len(set(tokens)) == 1, f"one token for u={u:g}", f"the tokens {tokens}", U_ALONE)


@check("as u goes over [0, 1), tokens come as often as they are likely")
def follows_the_distribution(sample_np):
    logits = random_logits(6, seed=5, scale=1.0)
    for temperature in (1.0, 0.5, 2.0):
        frequencies_are(sample_np, logits, SamplingParams(temperature=temperature), {
            "the temperature is left out: probabilities_np applies it":
                SamplingParams(temperature=1.0),
            "the logits are multiplied by the temperature: they are divided":
                SamplingParams(temperature=1 / temperature)})


@check("temperature, min_p, top_k, top_p: in this order")
def order(sample_np):
    logits = np.log([0.3, 0.02, 0.25, 0.2, 0.13, 0.1])
    everything = SamplingParams(temperature=1.5, min_p=0.3, top_k=4, top_p=0.8)
    with truncations():
        for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.6),
                       SamplingParams(min_p=0.6), SamplingParams(temperature=3.0, min_p=0.5),
                       SamplingParams(top_k=3, top_p=0.6), SamplingParams(min_p=0.8, top_p=0.54),
                       everything):
            frequencies_are(sample_np, logits, params, {
                "nothing is truncated: probabilities_np applies top_k, top_p and min_p":
                    SamplingParams(temperature=params.temperature)}, {
                "the temperature comes after the truncations: it comes before them, and so "
                "decides how many tokens they let through":
                    distribution(logits, params, temperature_first=False),
                "top_p comes before top_k, or before min_p: it is the last":
                    distribution(logits, params, ("top_p", "min_p", "top_k")),
            })


@check("tokens lie along [0, 1) in the order of their ids")
def in_order_of_ids(sample_np):
    logits, params = np.log([0.1, 0.6, 0.3]), SamplingParams()
    by_size = [1, 2, 0]
    for u in (0.05, 0.15, 0.65, 0.75, LAST_U):
        equal(sample_np(logits, params, u), drawn([0.1, 0.6, 0.3], u), mistakes={
            "the tokens are laid out by size: draw_np takes them by id":
                by_size[drawn([0.6, 0.3, 0.1], u)],
            "1 − u is drawn with, not u": drawn([0.1, 0.6, 0.3], 1 - u),
        })


@check("penalties change what is drawn, too")
def penalties_when_drawing(sample_np):
    logits = np.log([0.5, 0.3, 0.2])
    params = SamplingParams(presence_penalty=1.5, temperature=0.8)
    changed = logits - np.array([0.0, 1.5, 0.0])
    frequencies_are(sample_np, logits, params, {}, {
        "penalties are left out where a token is drawn: process_logits_np comes first":
            distribution(logits, params)}, expected=distribution(changed, params),
        arguments=([0, 2], [1, 1]))


@check("logits that are no numbers are refused")
def refused(sample_np):
    for bad in (math.nan, math.inf):
        for params in (SamplingParams(temperature=0), SamplingParams()):
            raises(FloatingPointError, sample_np, np.array([1.0, bad, 2.0]), params, 0.5, hint=(
                f"one logit is {bad}: raise FloatingPointError. argmax finds NaN first, so to "
                "look at the best logit is enough"))
    raises(FloatingPointError, sample_np, np.full(3, NO), SamplingParams(), 0.5, hint=(
        "every token is ruled out, so the best logit is −∞: raise FloatingPointError"))


@check("tokens that are ruled out do no harm", hint=(
    "−∞ is a token that is ruled out, and no reason to refuse: it is the best logit that has to be "
    "finite"))
def ruled_out(sample_np):
    logits = np.array([NO, 1.0, NO, 0.0])
    for u, token in ((0.0, 1), (0.5, 1), (0.9, 3), (LAST_U, 3)):
        equal(sample_np(logits, SamplingParams(), u), token)


@check("the engine answers with it", twin=False)  # the runner of this little model is NumPy's
def in_the_engine(sample_np):
    V, num_tokens, seed = 11, 24, 7
    table = random_logits((V, V))  # a model that sees one token: what follows which
    params = SamplingParams(temperature=1.3, top_p=0.9, frequency_penalty=0.5, seed=seed)
    with truncations(), using(sample_np=sample_np):
        runner = SimpleNamespace(sample=NumpyRunner.sample,
                                 forward=lambda tokens, *_, **__: table[tokens])
        request = SimpleNamespace(params=params, prompt_token_ids=[3], stop_token_ids=())
        steps = decode(runner, table[3], SimpleNamespace(length=0), request,
                       request_rng(seed, 0), V)
        tokens = [int(next(steps)[0]) for _ in range(num_tokens)]
    rng, expected, logits = request_rng(seed, 0), [], table[3]
    for _ in range(num_tokens):
        counts = Counter(expected)
        penalized = [x - 0.5 * counts[i] for i, x in enumerate(logits)]
        expected.append(drawn(distribution(penalized, params), rng.random()))
        logits = table[expected[-1]]
    equal(tokens, expected, hint="sample_np gets the output so far, and a new u for every token")


def frequencies_are(sample_np, logits, params, other_params, others=None, expected=None,
                    arguments=()):
    """Over a grid of u each token comes as often as its probability says, in whatever order a
    function lays the tokens out.

    other_params, others: {mistake: the params, or the distribution, that it is like}.
    """
    num = 400
    tokens = [int(sample_np(logits, params, (i + 0.5) / num, *arguments)) for i in range(num)]
    got = np.bincount(tokens, minlength=len(logits)) / num
    expected = distribution(logits, params) if expected is None else expected
    wrong = {**{text: distribution(logits, each) for text, each in other_params.items()},
             **(others or {})}
    tolerance = 1.5 / num  # a boundary may fall on either side of a grid point
    close(got, expected, tolerance, hint=(
        f"these are the shares of each token in {num} calls, u = 0.5/{num}, 1.5/{num}, …"),
        mistakes=wrong)

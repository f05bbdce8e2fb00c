"""Grader of chapter 10_continuous_batching. README.md in this folder tells how graders are written.

Sequences and blocks are stand-ins that count, and that refuse what was not asked for: no tensor is
needed to see who goes next. What they are asked, and how often, is the student's own affair.
"""

from __future__ import annotations

import math
import random
from collections import UserList
from types import SimpleNamespace

import numpy as np

from minillm.block_manager import BlockManager
from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import CheckFailed, check, equal, require
from minillm.engine import Engine, EngineConfig
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np
from minillm.model_runner import NumpyRunner
from minillm.request import Request
from minillm.sampling_params import SamplingParams

BLOCK_SIZE = 4
MAX_QUESTIONS = 1000  # in one step, of the blocks: far more than any answer needs
UNSORTED = "`running` is in any order: go by `order`, not by the place in the list"
YOUNGEST = "the youngest has the largest `order`, wherever it stands in the list"


class Questions:
    """Counts what the blocks are asked in a step, so that no loop goes round for ever."""

    num_questions = 0

    def ask(self):
        self.num_questions += 1
        require(self.num_questions <= MAX_QUESTIONS, "a step to be filled",
                f"{MAX_QUESTIONS} questions to the blocks, and no end", "a loop goes round for "
                "ever: what it waits for must change inside it, or the loop be left")


class FakeSequence:
    """So many tokens, of which so many are computed."""

    def __init__(self, name, arrival, num_prompt_tokens, num_tokens, num_computed_tokens=0):
        self.name, self.order = name, (arrival, 0)
        self.num_prompt_tokens = num_prompt_tokens
        self.token_ids = [7] * num_tokens
        self.num_computed_tokens = num_computed_tokens
        self.num_preemptions = 0

    @property
    def num_uncomputed_tokens(self):
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self):
        return self.num_prompt_tokens <= self.num_computed_tokens == len(self.token_ids) - 1

    def __repr__(self):
        return self.name


class FakeBlocks(Questions):
    """Counts blocks, and says no where there are none.

    num_free: nobody's   held: {sequence: blocks that nobody else holds}
    table: {sequence: blocks that it can write to}, also those that others hold
    cached: {sequence: tokens that were computed before, for another}
    """

    def __init__(self, num_free):
        self.num_free, self.held, self.table, self.cached = num_free, {}, {}, {}
        self.new_step()

    def new_step(self):
        self.num_questions, self.grown = 0, []

    def num_missing(self, sequence, num_tokens):
        needed = math.ceil((sequence.num_computed_tokens + num_tokens) / BLOCK_SIZE)
        return max(0, needed - self.table.get(sequence, 0))

    def can_grow(self, sequence, num_tokens):
        self.ask()
        return self.num_missing(sequence, num_tokens) <= self.num_free

    def can_admit(self, sequence, num_spare_blocks=0):
        self.ask()
        needed = math.ceil(len(sequence.token_ids) / BLOCK_SIZE)
        return needed + num_spare_blocks <= self.num_free

    def grow(self, sequence, num_tokens):
        require(sequence in self.table, f"{sequence} to be admitted, and then to grow",
                f"grow({sequence}, {num_tokens}) for one that has no blocks",
                "only who runs can grow: a waiting sequence is admitted first, and one that was "
                "preempted has lost its blocks and goes without")
        missing = self.num_missing(sequence, num_tokens)
        require(missing <= self.num_free, f"room for grow({sequence}, {num_tokens})",
                f"{missing} blocks missing, {self.num_free} free", "ask can_grow before every grow "
                "of a decoding sequence and grow at once, or another is told of the same block; "
                "preempt `while` it says no: one that leaves may have shared its blocks")
        self.take(sequence, missing)
        self.grown.append((sequence, num_tokens))

    def admit(self, sequence):
        require(sequence not in self.table, f"{sequence} to be admitted once",
                "a second admit while it runs", "admit is for who comes out of `waiting`")
        needed = math.ceil(len(sequence.token_ids) / BLOCK_SIZE)
        require(needed <= self.num_free, f"{needed} blocks for {sequence}",
                f"{self.num_free} free", "ask can_admit before you admit")
        self.take(sequence, needed)
        sequence.num_computed_tokens = self.cached.get(sequence, 0)

    def take(self, sequence, num_blocks):
        self.num_free -= num_blocks
        for counts in (self.held, self.table):
            counts[sequence] = counts.get(sequence, 0) + num_blocks

    def release(self, sequence):
        self.num_free += self.held.pop(sequence, 0)
        self.table.pop(sequence, None)
        sequence.num_computed_tokens = 0


class Scene:
    """Who runs, who waits, and what there is to share out.

    `waiting` and `running` are UserLists: a plain list that changes is taken for an accident.
    """

    def __init__(self, seats=8, budget=100, free=100):
        self.waiting, self.running, self.blocks = UserList(), UserList(), FakeBlocks(free)
        self.seats, self.budget = seats, budget
        self.sequences = {}

    def decodes(self, name, arrival, computed=5, shared=False):
        """A running sequence that has one token to compute; 5 of 8 places in its 2 blocks are
        taken, and with computed=4 it wants another block."""
        return self.run(FakeSequence(name, arrival, 2, computed + 1, computed), computed, shared)

    def prefills(self, name, arrival, left, computed=4):
        """A running sequence of whose prompt a part is to be computed; it has all its blocks."""
        length = computed + left
        return self.run(FakeSequence(name, arrival, length, length, computed), length)

    def run(self, sequence, num_tokens, shared=False):
        num_blocks = math.ceil(num_tokens / BLOCK_SIZE)
        self.blocks.table[sequence] = num_blocks
        self.blocks.held[sequence] = 0 if shared else num_blocks
        self.running.append(sequence)
        self.sequences[sequence.name] = sequence
        return self

    def waits(self, name, arrival, length, cached=0):
        sequence = FakeSequence(name, arrival, length, length)
        self.blocks.cached[sequence] = cached
        self.waiting.append(sequence)
        self.sequences[name] = sequence
        return self

    def step(self, schedule, mistakes=None, hint=None, **expected):
        """Fill a step, look at what must always hold, and compare {name: tokens}."""
        chosen = self.call(schedule)
        mistakes = {text: sorted(wrong.items()) for text, wrong in (mistakes or {}).items()}
        equal(sorted(chosen.items()), sorted(expected.items()), hint, mistakes)
        return self

    def call(self, schedule, waiting=None, mistakes=None, hint=None):
        """-> {name: tokens} of the step that the student has filled.   waiting: names of those who
        are to wait afterwards."""
        self.blocks.new_step()
        before = {*self.waiting, *self.running}
        answer = schedule(self.waiting, self.running, self.blocks, self.seats, self.budget)
        pairs = self.pairs(answer)
        self.lists_hold(before)
        if waiting is not None:
            equal([each.name for each in self.waiting], waiting, hint, mistakes)
        self.choice_holds(pairs)
        return {sequence.name: int(num_tokens) for sequence, num_tokens in pairs}

    def pairs(self, answer):
        form = "a list of pairs (sequence, number of its tokens)"
        require(answer is not None, form, "None", "is a `return` missing?")
        try:
            len(answer)
            pairs = [(sequence, num_tokens) for sequence, num_tokens in answer]
        except (TypeError, ValueError):
            raise CheckFailed(form, f"{answer!r:.80}") from None
        for sequence, num_tokens in pairs:
            is_pair = isinstance(sequence, FakeSequence) and hasattr(num_tokens, "__index__")
            require(is_pair, form, f"an entry ({sequence!r:.40}, {num_tokens!r:.40})")
        return pairs

    def lists_hold(self, before):
        both = [*self.waiting, *self.running]
        twice = {sequence for sequence in both if both.count(sequence) > 1}
        require(not twice, "every sequence in `waiting` or in `running`, and once",
                f"{names(twice)} twice", "who is admitted leaves `waiting` and enters `running`; "
                "change the two lists in place, `waiting = waiting[1:]` makes another one")
        lost = before - {*both}
        require(not lost, "every sequence in `waiting` or in `running`",
                f"{names(lost)} in neither", "change the two lists in place: a new list of the "
                "same name is not the caller's, and who is preempted goes back to `waiting`")
        orders = [sequence.order for sequence in self.waiting]
        require(orders == sorted(orders), "`waiting` in the order of arrival",
                f"{[*self.waiting]}", "preempt() puts a sequence where its arrival belongs, in "
                "front of those that came later")
        for sequence in self.running:
            require(sequence in self.blocks.table, f"blocks for {sequence}, which runs", "none",
                    "blocks.admit gives a sequence its blocks when it enters `running`")
        for sequence in self.waiting:
            require(sequence not in self.blocks.table, f"no blocks for {sequence}, which waits",
                    f"{self.blocks.table.get(sequence)}", "who goes back to `waiting` gives its "
                    "blocks back: preempt() does all of it")
        require(len(self.running) <= self.seats, f"at most {self.seats} running sequences",
                f"{len(self.running)}", "max_num_seqs counts the seats, those taken included")

    def choice_holds(self, pairs):
        chosen = [sequence for sequence, _ in pairs]
        for sequence, num_tokens in pairs:
            require(chosen.count(sequence) == 1, f"{sequence} once", "twice in one step",
                    "its next tokens depend on those before: one entry for each sequence")
            require(sequence in self.running, "only running sequences in the step",
                    f"{sequence}, which waits", "one that was preempted has lost its keys: it "
                    "goes without, also if its turn comes later in your loop")
            require(num_tokens >= 1, f"at least one token of {sequence}", f"{num_tokens}",
                    "when the budget is used up, nobody else is in this step")
            require(num_tokens <= sequence.num_uncomputed_tokens,
                    f"at most {sequence.num_uncomputed_tokens} tokens of {sequence}",
                    f"{num_tokens}", "there is no more to compute: look at num_uncomputed_tokens "
                    "after admit, which may have lowered it")
        total = sum(num_tokens for _, num_tokens in pairs)
        require(total <= self.budget, f"at most {self.budget} tokens in the step", f"{total}",
                "take every choice off the budget, and cut a prompt to what is left of it")
        equal(sorted(self.blocks.grown, key=str), sorted(pairs, key=str), hint=(
            "every entry of the result needs one blocks.grow with its number of tokens, and "
            "nobody else grows"))

    def compute(self, chosen):
        """What the engine does after a step; -> names of those that have a new token."""
        ended = []
        for name, num_tokens in chosen.items():
            sequence = self.sequences[name]
            sequence.num_computed_tokens += num_tokens
            if sequence.num_uncomputed_tokens == 0:
                sequence.token_ids.append(7)
                ended.append(name)
        return ended


def names(sequences):
    return ", ".join(sorted(map(str, sequences)))


# ── who is in the step ───────────────────────────────────────────────────────────────────────


@check("an idle engine has nothing to compute")
def idle(schedule):
    Scene().step(schedule)


@check("who decodes gets one token")
def one_token_each(schedule):
    scene = Scene().decodes("A", 0).decodes("B", 1)
    scene.step(schedule, A=1, B=1)


@check("a request joins while others decode")
def joins(schedule):
    scene = Scene().decodes("A", 0).waits("B", 1, length=6).waits("C", 2, length=3)
    scene.step(schedule, A=1, B=6, C=3, mistakes={
        "newcomers wait until nobody runs any more, as in a static batch: admit them while there "
        "is a seat": {"A": 1},
        "those who decode stand still while prompts come in: both go into one step":
            {"B": 6, "C": 3},
        "one newcomer a step: go on while there are seats and budget": {"A": 1, "B": 6},
    })


@check("decodes come first, prompts get what is left of the budget")
def decodes_first(schedule):
    scene = Scene(budget=6).prefills("A", 0, left=10).decodes("B", 1).decodes("C", 2)
    scene.step(schedule, A=4, B=1, C=1, mistakes={
        "a prompt goes before those who decode: somebody is reading them": {"A": 6},
        "all go by arrival, decode or not: first all that decode, then the prompts": {"A": 6},
    })
    scene = Scene(budget=2).prefills("A", 0, left=10).decodes("B", 1).decodes("C", 2)
    scene.step(schedule, B=1, C=1)


@check("the oldest comes first, wherever it stands in the list")
def oldest_first(schedule):
    scene = Scene(budget=2).decodes("C", 2).decodes("A", 0).decodes("B", 1)
    scene.step(schedule, A=1, B=1, hint=UNSORTED)
    scene = Scene(budget=5).prefills("B", 1, left=4).prefills("A", 0, left=9)
    scene.step(schedule, A=5, hint=UNSORTED, mistakes={
        "prompts share the budget: the oldest takes all it can, so that it is done soon":
            {"A": 3, "B": 2}})
    scene = Scene(budget=5).prefills("B", 1, left=4).prefills("A", 0, left=3)
    scene.step(schedule, A=3, B=2)


@check("a long prompt is computed in pieces")
def pieces(schedule):
    scene = Scene(budget=4).waits("A", 0, length=10).waits("B", 1, length=3)
    whole = "a prompt longer than the budget waits for a step that takes it whole: no step will"
    for expected in ({"A": 4}, {"A": 4}, {"A": 2, "B": 2}, {"A": 1, "B": 1}):
        scene.step(schedule, **expected, mistakes={whole: {}, (
            "a shorter prompt overtakes one that does not fit whole: cut the first to what is "
            "left of the budget"): {"B": 3}},
            hint="a prompt takes as many tokens as the budget has, and goes on where it stopped")
        scene.compute(expected)


@check("what others have computed is not computed again")
def cached(schedule):
    scene = Scene(budget=10).waits("A", 0, length=12, cached=8).waits("B", 1, length=5)
    scene.step(schedule, A=4, B=5, hint=(
        "admit lowers num_uncomputed_tokens where it finds a known beginning: look at it after"))


# ── seats, budget, blocks, and the order of arrival ──────────────────────────────────────────


@check("there are max_num_seqs seats")
def seats(schedule):
    scene = Scene(seats=3).decodes("A", 0).decodes("B", 1)
    scene.waits("C", 2, length=3).waits("D", 3, length=3)
    scene.step(schedule, A=1, B=1, C=3, mistakes={
        "one seat stays empty: with 2 of 3 taken, one more may come in": {"A": 1, "B": 1}})
    scene = Scene(seats=1).prefills("A", 0, left=7).waits("B", 1, length=3)
    scene.step(schedule, A=7)


@check("nobody is admitted for whom there is no token")
def no_budget(schedule):
    scene = Scene(budget=2).decodes("A", 0).decodes("B", 1).waits("C", 2, length=3)
    scene.step(schedule, A=1, B=1)
    require(scene.sequences["C"] in scene.waiting, "C to wait", "C among `running`",
            "the budget is used up: a seat and blocks without a token are wasted")


@check("nobody is overtaken")
def overtaking(schedule):
    scene = Scene(free=5).decodes("A", 0).waits("B", 1, length=20).waits("C", 2, length=3)
    scene.step(schedule, A=1, mistakes={
        "C overtakes B, which does not fit: with ever new small ones, B would wait for ever":
            {"A": 1, "C": 3},
        "B is admitted without a spare block for A": {"A": 1, "B": 20}})


@check("a newcomer leaves a block for everyone who runs")
def spare_blocks(schedule):
    def scene(free):
        scene = Scene(free=free).decodes("A", 0).prefills("B", 1, left=3)
        return scene.waits("C", 2, length=12)

    scene(free=4).step(schedule, A=1, B=3, mistakes={
        "C takes blocks that A and B will want soon: hand can_admit a spare block for each":
            {"A": 1, "B": 3, "C": 12}})
    scene(free=5).step(schedule, A=1, B=3, C=12, mistakes={
        "more spare blocks than running sequences: 3 for C and 2 to spare are 5, and 5 are free":
            {"A": 1, "B": 3}})
    Scene(free=3).waits("A", 0, length=12).step(schedule, A=12, mistakes={
        "nobody runs, so no block is spared: a request as large as the cache would wait for ever":
            {}})
    two = Scene(free=3).decodes("A", 0).waits("B", 1, length=3).waits("C", 2, length=3)
    two.step(schedule, A=1, B=3, mistakes={
        "B was admitted a moment ago and runs too: when C asks, two blocks are to be spared":
            {"A": 1, "B": 3, "C": 3}})


# ── out of blocks ────────────────────────────────────────────────────────────────────────────


@check("when blocks run out, the youngest is preempted")
def youngest(schedule):
    scene = Scene(free=0).decodes("C", 2).decodes("A", 0).decodes("B", 1, computed=4)
    chosen = scene.waits("D", 3, length=3).call(schedule, waiting=["C", "D"], mistakes={
        "B has no block, and stands still until somebody ends; when all want a block, that is for "
        "ever: preempt one": ["D"],
        "B preempts itself, though C came later: " + YOUNGEST: ["B", "D"],
        "the oldest is preempted, who has waited longest: " + YOUNGEST: ["A", "D"],
    }, hint="C is all that has to go")
    equal(chosen, {"A": 1, "B": 1}, hint="with the blocks of C, both have room")


@check("the youngest may be the one that asks")
def itself(schedule):
    scene = Scene(free=0).decodes("A", 0).decodes("B", 1, computed=4)
    chosen = scene.call(schedule, waiting=["B"], mistakes={
        "B preempts one that came before it; it is the youngest itself, and goes without": ["A"],
        "B keeps its blocks, and stands still: were all to do so, all might wait for each other":
            [],
    })
    equal(chosen, {"A": 1}, hint="A has room, and B goes without")
    scene = Scene(free=1).decodes("A", 0, computed=4).decodes("B", 1, computed=4)
    scene.step(schedule, A=1, hint="A gets the last block, and B finds none")


@check("preemption goes on until there is room")
def until(schedule):
    scene = Scene(free=0).decodes("A", 0, computed=4).decodes("B", 1)
    scene = scene.decodes("C", 2, shared=True)
    chosen = scene.call(schedule, waiting=["B", "C"], hint=(
        "C shares all its blocks, so its leaving frees none: preempt `while` can_grow says no"))
    equal(chosen, {"A": 1}, hint="with the block of B, A has room")


@check("who has been preempted is not in the step")
def not_in_the_step(schedule):
    scene = Scene(free=0).decodes("A", 0, computed=4).decodes("B", 1).prefills("C", 2, left=7)
    scene.step(schedule, A=1, B=1, mistakes={
        "C is the youngest of all who run, though its prompt is still on its way":
            {"A": 1, "C": 7}})
    scene = Scene(free=0).decodes("A", 0, computed=4).decodes("B", 1).decodes("C", 2)
    scene.step(schedule, A=1, B=1)


@check("a step that preempts admits nobody")
def no_newcomers(schedule):
    scene = Scene(free=0).decodes("A", 0, computed=4).prefills("C", 2, left=12)
    scene.waits("B", 1, length=3).step(schedule, A=1, mistakes={
        "B comes in on the blocks that C just lost: memory is short, let this step pass":
            {"A": 1, "B": 3}})


# ── whole loads ──────────────────────────────────────────────────────────────────────────────


def random_load(seed):
    """-> a Scene, and [(step of arrival, prompt, answer), ...]; each fits in the cache alone."""
    rng = random.Random(seed)
    seats = rng.randint(1, 5)
    num_blocks = rng.randint(5, 12)
    scene = Scene(seats, budget=rng.randint(seats, 3 * seats), free=num_blocks)
    requests, step = [], 0
    for _ in range(rng.randint(4, 12)):
        step += rng.choice((0, 0, 1, 4))
        prompt = rng.randint(1, num_blocks * BLOCK_SIZE // rng.choice((2, 5)))
        answer = rng.randint(1, num_blocks * BLOCK_SIZE - prompt)
        requests.append((step, prompt, answer))
    return scene, requests


def run_load(seed, choose):
    """Drive a random load to its end; choose(scene) fills a step. Yields (scene, chosen, oldest),
    `oldest` being who was the oldest unfinished one when the step was filled."""
    scene, requests = random_load(seed)
    arrivals = [(f"R{number}", *each) for number, each in enumerate(requests)]
    answers = {name: answer for name, _, _, answer in arrivals}
    # In every step the oldest one computes a token at least, and never loses one.
    max_steps = arrivals[-1][1] + sum(prompt + answer for _, _, prompt, answer in arrivals)
    for step in range(max_steps + 1):
        while arrivals and arrivals[0][1] <= step:
            name, _, prompt, _ = arrivals.pop(0)
            scene.waits(name, int(name[1:]), prompt)
        unfinished = [*scene.waiting, *scene.running]
        if not unfinished and not arrivals:
            return
        oldest = min((each.name for each in unfinished), key=lambda name: int(name[1:]),
                     default=None)
        chosen = choose(scene)
        yield scene, chosen, oldest
        for name in scene.compute(chosen):
            sequence = scene.sequences[name]
            if len(sequence.token_ids) - sequence.num_prompt_tokens == answers[name]:
                scene.running.remove(sequence)
                scene.blocks.release(sequence)
    raise CheckFailed("all requests to come to their end", f"{names(unfinished)} unfinished after "
                      f"{max_steps} steps", "somebody waits for ever")


@check("nobody waits for ever, whatever comes")
def progress(schedule):
    for seed in range(60):
        for scene, chosen, oldest in run_load(seed, lambda scene: scene.call(schedule)):
            require(oldest is None or oldest in chosen,
                    f"the oldest request, {oldest}, to get on in every step",
                    f"a step of {chosen}, with {names(scene.running)} running and "
                    f"{scene.blocks.num_free} blocks free", "if the oldest gets on in every step, "
                    "everybody becomes the oldest some day, and nobody waits for ever")


@check("every step of a random load is filled by the three rules")
def by_the_rules(schedule):
    for seed in range(100, 160):
        for _ in run_load(seed, lambda scene: compared(scene, schedule)):
            pass


def compared(scene, schedule):
    # The last token of a prompt may pass for a decode, or for a piece of a prompt.
    plans = [plan(scene, decodes) for decodes in (
        lambda each: each.num_uncomputed_tokens == 1, lambda each: each.is_decoding)]
    state = (f"running {describe(scene.running)}, waiting {describe(scene.waiting)}, "
             f"{scene.blocks.num_free} free blocks of {BLOCK_SIZE}, {scene.seats} seats, "
             f"{scene.budget} tokens")
    chosen = scene.call(schedule)
    got = chosen, [each.name for each in scene.waiting]
    require(got in plans, f"{plans[0][0]}, and {plans[0][1]} waiting",
            f"{got[0]}, and {got[1]} waiting", f"it was: {state}")
    return chosen


def describe(sequences):
    return "[" + ", ".join(f"{each} {each.num_computed_tokens}/{len(each.token_ids)}"
                           for each in sequences) + "]"


def plan(scene, decodes):
    """The three rules in plain arithmetic;  -> {name: tokens}, names of those who wait."""
    by_age = sorted(scene.running, key=lambda each: each.order)
    staying, waiting = list(by_age), [*scene.waiting]
    held, free = dict(scene.blocks.held), scene.blocks.num_free
    budget, chosen = scene.budget, {}
    for sequence in filter(decodes, by_age):
        missing = math.ceil((sequence.num_computed_tokens + 1) / BLOCK_SIZE) - held[sequence]
        while budget and sequence in staying and missing > free:
            leaving = staying.pop()
            free += held[leaving]
            waiting.append(leaving)
        if budget and sequence in staying:
            free, budget, chosen[sequence.name] = free - max(0, missing), budget - 1, 1
    for sequence in staying:
        if not decodes(sequence) and budget:
            chosen[sequence.name] = min(budget, sequence.num_uncomputed_tokens)
            budget -= chosen[sequence.name]
    waiting.sort(key=lambda each: each.order)
    num_running, preempted = len(staying), len(staying) < len(by_age)
    while waiting and not preempted and num_running < scene.seats and budget:
        needed = math.ceil(len(waiting[0].token_ids) / BLOCK_SIZE)
        if needed + num_running > free:
            break
        sequence = waiting.pop(0)
        chosen[sequence.name] = min(budget, len(sequence.token_ids))
        budget -= chosen[sequence.name]
        free, num_running = free - needed, num_running + 1
    return chosen, [each.name for each in waiting]


# ── in the engine ────────────────────────────────────────────────────────────────────────────

# Pairwise different, so that no mixed-up axis passes.
L, H, K, D, V = 2, 6, 2, 4, 13
CONFIG = ModelConfig(vocab_size=V, hidden_size=10, intermediate_size=7, num_hidden_layers=L,
                     num_attention_heads=H, num_key_value_heads=K, head_dim=D)
TOKENIZER = SimpleNamespace(vocab_size=V, special_tokens={}, token_bytes=lambda token: b"x")
REQUESTS = (([3, 1, 4, 1, 5, 9, 2, 6], 9), ([5, 3], 14), ([5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6], 5),
            ([2, 6, 4], 12), ([3, 3, 8, 3, 2], 7))


@check("each request gets the tokens that it would get alone")
def in_the_engine(schedule):
    weights = random_weights(np.random.default_rng(7))
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=5, block_size=4, num_blocks=9)
    engine = Engine(Runner(weights), TOKENIZER, config)
    scheduler = engine.scheduler
    scheduler.blocks = AskedBlocks(config.num_blocks, config.block_size)
    scheduler.waiting, scheduler.running = UserList(), UserList()  # as in a Scene
    requests = [Request(prompt, SamplingParams(temperature=0, max_tokens=num_tokens), ())
                for prompt, num_tokens in REQUESTS]
    ids = [engine.add_request(request) for request in requests]
    sequences = [engine.answers[id][0].sequence for id in ids]
    num_steps, most = 0, sum(len(prompt) + num_tokens for prompt, num_tokens in REQUESTS)
    with using(schedule=schedule):
        while any(map(engine.is_unfinished, ids)):
            num_steps += 1
            scheduler.blocks.num_questions = 0
            require(num_steps <= most, f"an end after {most} steps at the most", "none")
            try:
                engine.step()
                scheduler.blocks.check_integrity(sequences)
            except (ValueError, LookupError) as error:
                raise CheckFailed("a step that can be computed", f"{type(error).__name__}: "
                                  f"{error}", "the checks above say which rule is broken") from None
    for request in requests:
        expected = alone(weights, request.prompt_token_ids, request.params.max_tokens)
        equal(request.output.token_ids, expected, hint=(
            "the tokens depend on who else runs: a sequence was computed twice in a step, or "
            "went on after it had lost its blocks"))


class AskedBlocks(Questions, BlockManager):
    """The engine's blocks."""

    def can_grow(self, *args, **kwargs):
        self.ask()
        return super().can_grow(*args, **kwargs)

    def can_admit(self, *args, **kwargs):
        self.ask()
        return super().can_admit(*args, **kwargs)


class Runner(NumpyRunner):
    """The engine's NumPy runner, on a random model in float64."""

    def __init__(self, weights):
        self.weights, self.dtype, self.kv_dtype = weights, "float64", "float64"


class NoCache:
    """Keeps nothing: the whole text is in every pass."""

    def attend(self, layer, q, k, v):
        out = np.zeros(q.shape)
        for n in range(len(q)):
            for h in range(H):
                keys, values = k[: n + 1, h // (H // K)], v[: n + 1, h // (H // K)]
                scores = keys @ q[n, h] / math.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[n, h] = weights @ values / weights.sum()
        return out


def alone(weights, prompt_token_ids, num_tokens):
    """The best token, again and again, by one pass over the whole text for each."""
    token_ids = list(prompt_token_ids)
    for _ in range(num_tokens):
        positions = np.arange(len(token_ids))
        logits = forward_np(weights, np.array(token_ids), positions, NoCache())
        token_ids.append(int(logits[-1].argmax()))
    return token_ids[len(prompt_token_ids):]


def random_weights(rng):
    C, F = CONFIG.hidden_size, CONFIG.intermediate_size

    def dense(*shape):
        return Dense(rng.normal(size=shape) / math.sqrt(shape[1]))

    def norm():
        return rng.normal(1, 0.2, size=C)

    blocks = [LayerWeights(norm(), dense((H + 2 * K) * D, C), dense(C, H * D), norm(),
                           dense(F, C), dense(F, C), dense(C, F)) for _ in range(L)]
    return Weights(CONFIG, dense(V, C), blocks, norm(), dense(V, C),
                   10000.0 ** (-np.arange(0, D, 2) / D))

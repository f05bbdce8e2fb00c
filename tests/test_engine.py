"""Whatever runs beside a request, however it is cut in pieces, preempted or interrupted, its answer
is the one that `generate` gives it alone: random schedules on tiny random models."""

from __future__ import annotations

import functools
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from checkpoints import SIZES, write_checkpoint

from minillm import SamplingParams
from minillm.config import ModelConfig
from minillm.engine import DEFAULT_CACHE_BYTES, Engine, EngineConfig, StepOutput
from minillm.errors import InputError
from minillm.generate import generate
from minillm.loading.checkpoint import Checkpoint
from minillm.loading.safetensors import HuggingFaceFolder
from minillm.model_runner import NumpyRunner, TorchRunner, batch_bucket
from minillm.paged_cache import PagedCacheTorch, PagedStepTorch, StepLayout
from minillm.request import Request

END = 0
CONTEXT_LEN = 40


class Letters:
    """A tokenizer: letters, the two halves of an é, and the token that ends a text. The model has
    three more tokens, which are no text."""

    vocab_size = 24
    special_tokens = {"<end>": END}
    pieces = [b"<end>", *(bytes([byte]) for byte in b"abcdefghijklmnopqrstu"), b"\xc3", b"\xa9"]

    def token_bytes(self, token):
        return self.pieces[token]


class RandomCheckpoint(Checkpoint):
    """Two layers of random numbers; head_dim 16 is what our attention kernel wants."""

    eos_token_ids, rope_freq_factors = (END,), None

    def __init__(self, head_dim=4):
        self.config = ModelConfig(
            vocab_size=27, hidden_size=18, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, head_dim=head_dim,
            max_position_embeddings=CONTEXT_LEN)

    def tensor(self, name, shape):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32)


# How much a logit may be off: in float64 not enough to matter; a byte that is rounded the other way
# changes a key by a hundredth.
NOISE = {"numpy": 0.0, "numpy int8": 0.0, "torch": 1e-4, "torch kernel": 1e-4, "torch padded": 1e-4,
         "torch int8": 0.01, "cuda": 1e-3}


@functools.cache
def new_runner(kind):
    """A model of one of the kinds in NOISE."""
    backend, _, extra = kind.partition(" ")
    kv_dtype = "int8" if extra == "int8" else "auto"
    if backend == "numpy":
        return NumpyRunner(RandomCheckpoint(), dtype="float64", kv_dtype=kv_dtype)
    device = "cuda" if backend == "cuda" else "cpu"
    runner = TorchRunner(RandomCheckpoint(16 if extra == "kernel" else 4), device, "float32",
                         kv_dtype)
    runner.pads_batches |= extra == "padded"
    return runner


def new_request(prompt, **params):
    return Request(list(prompt), SamplingParams(**params), (END,))


# ── What is asked: a fixed set of requests, so that each is answered alone only once ─────────


def make_pool(size=90):
    """[(prompt, params), ...]: prompts that share beginnings, and every kind of sampling."""
    rng = np.random.default_rng(5)
    stem = rng.integers(1, 24, 24).tolist()
    pool = []
    for index in range(size):
        shared = int(rng.choice([0, 0, 3, 4, 6, 8, 12, 15, 16, 21, 24]))
        tail = rng.integers(1, 24, int(rng.integers(0 if shared else 1, 9))).tolist()
        prompt = stem[:shared] + tail
        params = {"max_tokens": int(rng.integers(1, 13)), "temperature": 0.0}
        if rng.random() < 0.6:
            params |= {"seed": index, "temperature": float(rng.choice([0.5, 1.0, 1.5])),
                       "n": int(rng.choice([1, 1, 2, 3, 4]))}
        for chance, extra in [
            (0.1, {"top_k": 5}), (0.1, {"top_p": 0.8}), (0.1, {"min_p": 0.1}),
            (0.1, {"repetition_penalty": 1.4}), (0.1, {"frequency_penalty": 0.7}),
            (0.1, {"presence_penalty": 0.9}), (0.1, {"logit_bias": {3: 2.0, 7: -100.0}}),
            (0.2, {"logprobs": int(rng.integers(0, 4))}), (0.2, {"stop": ["e", "ab", "é"]}),
            (0.2, {"min_tokens": min(4, params["max_tokens"])}), (0.2, {"ignore_eos": True}),
        ]:
            params |= extra if rng.random() < chance else {}
        pool.append((prompt, params))
    pool.append((stem + stem[:13], {"temperature": 0.0, "max_tokens": 50}))  # the context ends it
    return pool


POOL = make_pool()


class DoubtfulRunner:
    """A runner that notes which of its tokens a rounding error could have changed: those that are
    not the same for 16 times a little noise on the logits and on u."""

    def __init__(self, runner, noise):
        self.runner, self.noise = runner, noise
        self.forward, self.top_logprobs = runner.forward, runner.top_logprobs
        self.are_clear = []

    def sample(self, logits, params, u, *token_ids):
        token = self.runner.sample(logits, params, u, *token_ids)
        rng = np.random.default_rng(len(self.are_clear))
        is_clear = True
        for _ in range(16 if self.noise else 0):
            noise = rng.normal(0, self.noise, logits.shape[0] + 1)
            noisy = logits + torch.from_numpy(noise[1:]).to(logits)
            noisy_u = min(max(u + noise[0], 0.0), 1 - 1e-9)
            is_clear &= token == self.runner.sample(noisy, params, noisy_u, *token_ids)
        self.are_clear.append(is_clear)
        return token


@dataclass
class Expected:
    """An answer given alone.   num_clear: its first tokens, that no rounding error can change."""

    completion: object
    num_clear: int


@functools.cache
def answer_alone(kind, index):
    """-> [Expected of each completion]. In float64 every token is clear."""
    prompt, params = POOL[index]
    request, runner = new_request(prompt, **params), new_runner(kind)
    doubtful = DoubtfulRunner(runner, NOISE[kind])
    cache = runner.new_cache(min(len(prompt) + request.params.max_tokens, CONTEXT_LEN))
    for _ in generate(doubtful, Letters(), request, cache):
        pass
    expected, start = [], 0
    for completion in request.output.outputs:
        are_clear = doubtful.are_clear[start : start + len(completion.token_ids)]
        expected.append(Expected(completion, [*are_clear, False].index(False)))
        start += len(completion.token_ids)
    return expected


def check_answer(output, alone, has_ended, noise):
    """An answer, or its beginning, is what it should be, as far as it is clear."""
    for found, expected in zip(output.outputs, alone, strict=True):
        wanted, num = expected.completion, min(expected.num_clear, len(found.token_ids))
        assert found.token_ids[:num] == wanted.token_ids[:num]
        assert found.metrics.num_output_tokens == len(found.token_ids)
        assert found.metrics.num_prompt_tokens == len(output.prompt_token_ids)
        if wanted.logprobs is not None:
            assert len(found.logprobs) == len(found.token_ids)
            for one, other in zip(found.logprobs[:num], wanted.logprobs):
                assert one == pytest.approx(other, abs=4 * noise + 1e-9)
        is_clear = expected.num_clear == len(wanted.token_ids)
        if has_ended:
            assert found.finish_reason is not None
        if is_clear and (has_ended or found.finish_reason):
            assert (found.text, found.finish_reason, found.token_ids) == (
                wanted.text, wanted.finish_reason, wanted.token_ids)


# ── A schedule: requests come and go while the engine is watched ─────────────────────────────


class Watched(Engine):
    """An engine that counts what happens in it, and checks each batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counts, self.num_step_tokens, self.sequences = Counter(), [], []

    def add_request(self, request):
        request_id = super().add_request(request)
        self.sequences += [answer.sequence for answer in self.answers[request_id].values()]
        return request_id

    def forward(self, batch):
        num_tokens = len(batch.tokens)
        assert num_tokens == sum(num for _, num in batch.scheduled) == len(batch.positions)
        assert num_tokens <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len({sequence.order for sequence, _ in batch.scheduled}) == len(batch.scheduled)
        self.num_step_tokens.append(num_tokens)
        self.counts["copies"] += len(batch.copies)
        self.counts["chunks"] += sum(num < sequence.num_uncomputed_tokens
                                     for sequence, num in batch.scheduled)
        self.counts["mixed steps"] += len({num > 1 for _, num in batch.scheduled}) == 2
        return super().forward(batch)

    def check_integrity(self):
        """After a step: nobody holds blocks but who runs, and the books are right."""
        scheduler = self.scheduler
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda each: each.order)
        for sequence in self.sequences:
            if sequence not in scheduler.running:
                assert not sequence.block_table.block_ids and not sequence.num_computed_tokens
        scheduler.blocks.check_integrity(self.sequences)


def random_engine(rng, kind, drawn, engine_class):
    """An engine that has just enough room for the largest request, or a little more."""
    num_tokens = max(min(len(POOL[index][0]) + POOL[index][1]["max_tokens"], CONTEXT_LEN)
                     for index in drawn)
    block_size, max_num_seqs = int(rng.integers(1, 9)), int(rng.integers(1, 7))
    extra = int(rng.choice([0, 0, 1, 2, 5, 40]))
    return engine_class(new_runner(kind), Letters(), EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + int(rng.choice([0, 0, 1, 3, 8, 30])),
        block_size=block_size, num_blocks=-(-num_tokens // block_size) + extra,
        enable_prefix_caching=bool(rng.random() < 0.7)))


class Schedule:
    """Requests that arrive, and are aborted, at random."""

    engine_class = Watched

    def __init__(self, seed, kind):
        self.rng, self.kind = np.random.default_rng(seed), kind
        drawn = self.rng.choice(len(POOL), int(self.rng.integers(1, 9))).tolist()
        self.engine = random_engine(self.rng, kind, drawn, self.engine_class)
        self.to_come = drawn
        self.arrival_rate = float(self.rng.choice([0.2, 0.5, 1.0]))
        self.abort_rate = float(self.rng.choice([0.0, 0.0, 0.05]))
        self.requests = {}  # request id -> (index in POOL, request)
        self.aborted, self.pieces, self.num_broken = set(), Counter(), 0

    def run(self):
        """To the end;  -> what happened, counted."""
        self.arrive()
        num_steps = 0
        while self.to_come or self.engine.answers:
            self.step()
            num_steps += 1
            assert num_steps < 1500, "somebody waits for ever"
            while self.to_come and self.rng.random() < self.arrival_rate:
                self.arrive()
            for request_id in list(self.engine.answers):
                if self.rng.random() < self.abort_rate:
                    self.abort(request_id)
        return self.check_end()

    def arrive(self):
        index = self.to_come.pop()
        prompt, params = POOL[index]
        request = new_request(prompt, **params)
        self.requests[self.engine.add_request(request)] = index, request

    def abort(self, request_id):
        self.engine.abort(request_id)
        self.engine.check_integrity()
        assert not self.engine.is_unfinished(request_id)
        self.aborted.add(request_id)

    def step(self):
        output = self.engine.step()
        self.engine.check_integrity()
        computed = sum(num_tokens for _, _, num_tokens, _ in output.scheduled)
        assert computed == (self.engine.num_step_tokens or [0])[-1]
        for request_id, completion, text in output.texts:
            key = request_id, completion.index
            self.pieces[key] = (self.pieces[key] or "") + text

    def check_end(self):
        engine = self.engine
        assert not engine.scheduler.running and not engine.scheduler.waiting
        assert not any(engine.scheduler.blocks.ref_counts)
        for request_id, (index, request) in self.requests.items():
            check_answer(request.output, answer_alone(self.kind, index),
                         request_id not in self.aborted, NOISE[self.kind])
            for completion in request.output.outputs if not self.num_broken else ():
                assert (self.pieces[request_id, completion.index] or "") == completion.text
        counts = engine.counts + Counter(
            schedules=1, steps=len(engine.num_step_tokens), aborts=len(self.aborted),
            tokens=sum(engine.num_step_tokens), interrupts=self.num_broken)
        for sequence in engine.sequences:
            counts["preemptions"] += sequence.num_preemptions
            counts["prefix hits"] += bool(sequence.num_cached_tokens)
        return counts


def run_schedules(seeds, kind, schedule=Schedule):
    """-> what happened in all of them. A schedule that fails names its seed: run it alone by
    `Schedule(seed, kind).run()`."""
    counts = Counter()
    for seed in seeds:
        try:
            counts += schedule(seed, kind).run()
        except BaseException as error:
            error.add_note(f"in {schedule.__name__}({seed}, {kind!r})")
            raise
    return counts


EVENTS = "copies", "chunks", "mixed steps", "aborts", "preemptions", "prefix hits"


def check_that_all_happened(counts):
    """A test of preemption that never preempts could not fail."""
    print(dict(counts))
    rare = {event: counts[event] for event in EVENTS if counts[event] < counts["schedules"] / 10}
    assert not rare, f"in {counts['schedules']} schedules"


@pytest.mark.parametrize("kind, num_schedules", [
    ("numpy", 1450), ("numpy int8", 200), ("torch", 50), ("torch kernel", 40), ("torch int8", 30),
    pytest.param("cuda", 100, marks=pytest.mark.cuda)])
def test_an_answer_is_the_same_in_every_schedule(kind, num_schedules):
    check_that_all_happened(run_schedules(range(num_schedules), kind))
    alone = [expected for index in range(len(POOL)) for expected in answer_alone(kind, index)]
    num_clear = sum(expected.num_clear for expected in alone)
    num_tokens = sum(len(expected.completion.token_ids) for expected in alone)
    assert num_clear == num_tokens or NOISE[kind] and num_clear > 0.3 * num_tokens


def test_a_padded_step_has_one_of_few_shapes(monkeypatch):
    """As on a GPU: a step that only decodes is one group, whose size is a bucket and whose width is
    a power of two, and the answers stay what they are."""
    shapes = Counter()

    def step(cache, spans):
        layout = StepLayout(spans, cache.block_size, 1000, in_one_group=True)
        if not layout.chunks:
            (rows, block_tables, context_lens), = layout.decodes
            shapes[block_tables.shape] += 1
            assert len(rows) == len(block_tables) == len(context_lens) == len(spans)
        return PagedStepTorch(cache, layout)

    monkeypatch.setattr(PagedCacheTorch, "step", step)
    check_that_all_happened(run_schedules(range(40), "torch padded"))
    assert sum(shapes.values()) > 400
    assert {size for size, _ in shapes} == {1, 2, 4, 8}  # 6 seats at most
    assert {width for _, width in shapes} <= {1, 2, 4, 8, 16, 32, 64}
    assert all(size == batch_bucket(size) for size in range(8, 257, 8))


# ── Steps that break off ─────────────────────────────────────────────────────────────────────


class Broken(KeyboardInterrupt):
    """Ctrl-C, at a moment that the test chooses."""


class Fragile(Watched):
    """An engine whose steps break off at random: in the model, which leaves its blocks in ruins, or
    with NaN for logits, or while tokens are drawn, or while they are written down."""

    rng, fault, num_faults = None, "none", 0

    def step(self):
        # Not for ever: who is interrupted before each end of a long prompt never comes to it.
        self.num_faults += 1
        faults = ["forward", "nan", "sample", "update", *["none"] * 4]
        self.fault = self.rng.choice(faults) if self.num_faults < 30 else "none"
        return super().step()

    def forward(self, batch):
        logits = super().forward(batch)
        is_bad = self.fault == "forward" or self.fault == "nan" and batch.rows
        for table, start, num_tokens in batch.spans if is_bad else ():
            for slot in table.slot_mapping(start, start + num_tokens):
                for array in self.cache.arrays():
                    ruin = np.nan if array.dtype.kind == "f" else 77
                    array[:, slot // self.cache.block_size, slot % self.cache.block_size] = ruin
        if self.fault == "forward":
            raise Broken
        return logits * np.nan if self.fault == "nan" and batch.rows else logits

    def sample(self, batch, logits):
        sampled = super().sample(batch, logits)
        if self.fault == "sample":
            raise Broken
        return sampled

    def update(self, batch, sampled):
        if self.fault == "update" and sampled:
            broken = sampled[self.rng.integers(len(sampled))][0]
            broken.add = self.break_off
            try:
                return super().update(batch, sampled)
            finally:
                del broken.add
        return super().update(batch, sampled)

    def break_off(self, *_):
        raise Broken


class BrokenSchedule(Schedule):
    engine_class = Fragile

    def __init__(self, seed, kind):
        super().__init__(seed, kind)
        self.engine.rng = self.rng

    def step(self):
        try:
            super().step()
        except (Broken, FloatingPointError):
            self.num_broken += 1
            self.engine.check_integrity()
            assert not self.engine.scheduler.running
            assert all(np.isfinite(array).all() for array in self.engine.cache.arrays())


@pytest.mark.parametrize("kind, num_schedules", [("numpy", 100), ("numpy int8", 30)])
def test_a_step_that_breaks_off_leaves_no_trace(kind, num_schedules):
    counts = run_schedules(range(num_schedules), kind, BrokenSchedule)
    check_that_all_happened(counts)
    assert counts["interrupts"] > 4 * num_schedules


class InterruptedSchedule(BrokenSchedule):
    """Ctrl-C before a random line of the bookkeeping: of the engine, the scheduler or the block
    manager. (Not while an answer writes its token down, which takes microseconds.)"""

    engine_class = Watched
    modules = "minillm.engine", "minillm.scheduler", "minillm.block_manager"

    def step(self):
        if self.num_broken >= 12:
            return super().step()
        num_lines = int(self.rng.integers(1, 300))

        def before_line(frame, event, _):
            nonlocal num_lines
            num_lines -= event == "line"
            if not num_lines:
                raise Broken
            return before_line

        def on_call(frame, event, _):
            is_bookkeeping = frame.f_globals.get("__name__") in self.modules
            return before_line if is_bookkeeping and frame.f_code.co_name != "step" else None

        engine_step = self.engine.step

        def traced_step():
            previous = sys.gettrace()
            sys.settrace(on_call)
            try:
                return engine_step()
            finally:
                sys.settrace(previous)

        self.engine.step = traced_step
        super().step()
        del self.engine.step


def test_the_books_survive_an_interrupt_at_any_line():
    counts = run_schedules(range(100), "numpy", InterruptedSchedule)
    print(dict(counts))
    assert counts["interrupts"] > 600


def test_a_nan_that_shows_late_is_gone_with_its_request():
    """Token 5 has NaN for an embedding. It stands in the first piece of a prompt, whose blocks are
    known and cached when the last piece, some steps later, shows it."""
    runner = NumpyRunner(RandomCheckpoint(), dtype="float64")
    engine = Watched(runner, Letters(), EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=4, block_size=2, num_blocks=30))
    good = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True}
    beside, after = new_request([2, 2, 7, 3, 9], **good), new_request([2, 2, 7, 3, 9], **good)
    engine.add_request(beside)
    embedding = runner.weights.embed_tokens.weight
    embedding[5] = np.nan
    bad = engine.add_request(new_request([5, *range(6, 16)], temperature=0.0))
    with pytest.raises(FloatingPointError):
        while True:
            engine.step()
            assert len(beside.output.token_ids) < 9
    engine.check_integrity()
    assert not any(np.isnan(array).any() for array in engine.cache.arrays())
    engine.abort(bad)
    engine.add_request(after)
    while engine.answers:
        engine.step()
        engine.check_integrity()
    cache = runner.new_cache(20)
    alone = new_request([2, 2, 7, 3, 9], **good)
    for _ in generate(runner, Letters(), alone, cache):
        pass
    assert beside.output.token_ids == after.output.token_ids == alone.output.token_ids


# ── transformers ─────────────────────────────────────────────────────────────────────────────


class Numbers:
    """A tokenizer for as many tokens as you like, none of which ends a text."""

    special_tokens = {}

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def token_bytes(self, token):
        return b"%d " % token


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_many_at_once_are_what_transformers_generates_one_by_one(tmp_path, backend):
    model = write_checkpoint(tmp_path, "LlamaForCausalLM", eos_token_id=None)
    checkpoint = HuggingFaceFolder(tmp_path)
    runner = (NumpyRunner(checkpoint) if backend == "numpy" else
              TorchRunner(checkpoint, "cpu", "float32"))
    V = SIZES["vocab_size"]
    engine = Watched(runner, Numbers(V), EngineConfig(
        max_num_seqs=5, max_num_batched_tokens=16, block_size=4, num_blocks=20))
    rng = np.random.default_rng(3)
    stem = rng.integers(V, size=13).tolist()
    prompts = [stem[: rng.integers(14)] + rng.integers(V, size=rng.integers(1, 20)).tolist()
               for _ in range(9)]
    requests = [new_request(prompt, temperature=0.0, max_tokens=15, ignore_eos=True)
                for prompt in prompts]
    for request in requests:
        engine.add_request(request)
    while engine.answers:
        engine.step()
        engine.check_integrity()
    assert sum(sequence.num_preemptions for sequence in engine.sequences)
    num_compared = 0
    for request in requests:
        found = model.generate(torch.tensor([request.prompt_token_ids]), max_new_tokens=15,
                               do_sample=False, return_dict_in_generate=True, output_scores=True)
        expected = found.sequences[0, len(request.prompt_token_ids):].tolist()
        best, second = torch.stack(found.scores)[:, 0].topk(2).values.T
        num_clear = [*(best - second > 1e-3).tolist(), False].index(False)
        assert request.output.token_ids[:num_clear] == expected[:num_clear]
        num_compared += num_clear
    assert num_compared > 100


# ── The books of the engine ──────────────────────────────────────────────────────────────────


def small_engine(**options):
    return Watched(new_runner("numpy"), Letters(), EngineConfig(**{
        "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, "num_blocks": 20,
        **options}))


def run(engine):
    """-> the StepOutputs until all have ended."""
    outputs = []
    while engine.answers:
        outputs.append(engine.step())
        engine.check_integrity()
    return outputs


def answers(count, **params):
    """Parameters of an answer of exactly so many tokens."""
    return {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **params}


def test_a_step_says_what_it_computed():
    """10 prompt tokens in pieces of 6 and 4; the other answer begins with the first one's prompt,
    and each token of an answer but the last goes through the model once."""
    engine = small_engine(max_num_seqs=3, max_num_batched_tokens=6)
    first = engine.add_request(new_request(range(1, 11), **answers(3, temperature=1.0, n=2,
                                                                   seed=4)))
    outputs = run(engine)
    assert [output.scheduled for output in outputs] == [
        [(first, 0, 6, True)], [(first, 0, 4, True)],
        [(first, 0, 1, False), (first, 1, 1, False)], [(first, 0, 1, False), (first, 1, 1, False)]]
    assert [[(request_id, completion.index) for request_id, completion, _ in output.texts]
            for output in outputs] == [[], *[[(first, 0), (first, 1)]] * 3]
    second = engine.add_request(new_request(range(1, 11), **answers(2)))
    assert [output.scheduled for output in run(engine)] == [
        [(second, 0, 2, True)], [(second, 0, 1, False)]]


def test_a_prompt_of_which_one_token_is_left_is_prefill():
    engine = small_engine()
    engine.add_request(new_request([1, 2, 3, 4, 5], **answers(1)))
    run(engine)
    request_id = engine.add_request(new_request([1, 2, 3, 4, 5], **answers(2)))
    assert [output.scheduled for output in run(engine)] == [
        [(request_id, 0, 1, True)], [(request_id, 0, 1, False)]]


def test_cached_tokens_are_those_of_other_requests():
    engine = small_engine()
    requests = [new_request(prompt, **params) for prompt, params in [
        (range(1, 11), answers(2)), (range(1, 11), answers(2, temperature=1.0, n=3, seed=1)),
        ([*range(1, 8), 20], answers(2)), ([9, *range(1, 10)], answers(2))]]
    for request in requests:
        engine.add_request(request)
        run(engine)
    assert [[completion.metrics.num_cached_tokens for completion in request.output.outputs]
            for request in requests] == [[0], [8, 8, 8], [4], [0]]
    assert [request.output.metrics.num_prompt_tokens for request in requests] == [10, 10, 8, 10]


def test_the_clock_of_a_request_starts_when_it_is_made_not_when_it_runs(monkeypatch):
    """One seat, and a second a step: the second request waits for three tokens of the first."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    engine = small_engine(max_num_seqs=1)
    requests = [new_request([1, 2], **answers(num)) for num in (3, 2)]
    for request in requests:
        engine.add_request(request)
    while engine.answers:
        now[0] += 1
        engine.step()
    first, second = (request.output.metrics for request in requests)
    assert (first.ttft_ms, first.itl_ms, first.e2e_ms) == (1000, [1000, 1000], 3000)
    assert (second.ttft_ms, second.itl_ms, second.e2e_ms) == (4000, [1000], 5000)
    assert (first.num_output_tokens, second.num_output_tokens) == (3, 2)


def test_a_step_without_requests_does_nothing():
    engine = small_engine()
    assert engine.step() == StepOutput([], [])


def test_an_aborted_request_keeps_what_has_come_and_its_metrics():
    engine = small_engine()
    request, waiting = (new_request([1, 2, 3], **answers(9, temperature=1.0, n=3, seed=5))
                        for _ in range(2))
    request_id, waiting_id = engine.add_request(request), engine.add_request(waiting)
    engine.step()
    engine.step()
    engine.abort(request_id)
    engine.abort(request_id)  # nothing happens
    engine.check_integrity()
    for completion in request.output.outputs:
        assert (len(completion.token_ids), completion.finish_reason) == (2, None)
        assert completion.metrics.num_output_tokens == 2
    engine.abort(waiting_id)
    assert engine.step() == StepOutput([], []) and not any(engine.scheduler.blocks.ref_counts)
    engine.abort(12345)


def test_a_request_may_be_aborted_before_its_first_step():
    engine = small_engine()
    request = new_request([1, 2, 3], **answers(9, temperature=1.0, n=3, seed=5))
    engine.abort(engine.add_request(request))
    assert [completion.metrics.ttft_ms for completion in request.output.outputs] == [None] * 3
    assert not engine.answers and not engine.scheduler.waiting


def test_one_completion_that_ends_leaves_the_others_running():
    """The stop string ends them at different moments, the request when the last one has ended."""
    engine = small_engine()
    request = new_request([1, 2, 3], seed=4, n=4, stop=["n", "c"], max_tokens=30)
    request_id, ends = engine.add_request(request), []
    while engine.is_unfinished(request_id):
        engine.step()
        ends.append(sum(bool(each.finish_reason) for each in request.output.outputs))
        assert len(engine.scheduler.running) == 4 - ends[-1]
    assert ends == sorted(ends) and ends[-1] == 4 and len(set(ends)) >= 3


def test_ten_thousand_who_wait_cost_no_cache():
    engine = small_engine()
    num_bytes = sum(array.nbytes for array in engine.cache.arrays())
    ids = [engine.add_request(new_request([1, 2, 3], **answers(2))) for _ in range(10_000)]
    assert engine.scheduler.blocks.num_available_blocks == 20
    engine.step()
    assert sum(array.nbytes for array in engine.cache.arrays()) == num_bytes
    assert len(engine.scheduler.running) == 4
    for request_id in ids:
        engine.abort(request_id)
    assert not engine.scheduler.waiting and engine.scheduler.blocks.num_available_blocks == 20


# ── What can never work is refused ───────────────────────────────────────────────────────────


def test_a_request_that_can_never_fit_is_refused_with_its_numbers():
    engine = small_engine(num_blocks=3)
    with pytest.raises(InputError, match="a prompt of 5 tokens and an answer of up to 8 cannot fit "
                                         "in the KV cache of 3 blocks of 4: shorten them, or "
                                         "raise num_blocks"):
        engine.add_request(new_request([1] * 5, **answers(8)))
    assert not engine.answers and not engine.scheduler.waiting
    engine.add_request(new_request([1] * 5, **answers(7)))
    run(engine)


def test_the_context_bounds_what_a_request_may_want():
    """An answer of up to 1000 tokens ends with the context, which fits."""
    engine = small_engine(num_blocks=CONTEXT_LEN // 4)
    request = new_request([1, 2, 3], **answers(1000))
    engine.add_request(request)
    run(engine)
    assert len(request.output.token_ids) == CONTEXT_LEN - 3
    assert request.output.finish_reason == "length"
    with pytest.raises(InputError, match="a prompt of 3 tokens and an answer of up to 37 cannot"):
        small_engine(num_blocks=CONTEXT_LEN // 4 - 1).check(request)


@pytest.mark.parametrize("options, message", [
    ({"max_num_batched_tokens": 3}, "max_num_batched_tokens is 3, must be at least max_num_seqs, "
                                    "which is 4"),
    ({"max_num_seqs": 0}, "max_num_seqs is 0, must be an integer of at least 1"),
    ({"block_size": 1.5}, "block_size is 1.5, must be an integer"),
    ({"num_blocks": True}, "num_blocks is True, must be an integer"),
    ({"num_blocks": -1}, "num_blocks is -1"),
    ({"max_num_batched_tokens": None}, "max_num_batched_tokens is None"),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1, must be True or False")])
def test_a_configuration_that_cannot_work_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        small_engine(**options)


def test_a_cache_holds_1_gib_if_nobody_says_otherwise():
    class Measured:
        """A runner whose cache is not made, only measured; 2 layers, 2 heads, 2·4 numbers."""

        weights = new_runner("numpy").weights
        made = []

        def new_paged_cache(self, num_blocks, block_size):
            self.made.append((num_blocks, block_size))
            return new_runner("numpy").new_paged_cache(1, block_size)

    Engine(Measured(), Letters(), EngineConfig(block_size=8))
    block_bytes = 2 * 2 * 2 * 4 * 8 * 8  # keys and values, L, K, D, block_size, float64
    assert Measured.made == [(1, 8), (DEFAULT_CACHE_BYTES // block_bytes, 8)]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_when_it_is_added():
    engine = Engine(NumpyRunner(RandomCheckpoint(), dtype="float64"), Letters(), EngineConfig(
        num_blocks=100, block_size=16))
    for num_tokens in (0, engine.context_len):
        with pytest.raises(InputError, match=f"{num_tokens} tokens, must have 1 to "
                                             f"{engine.context_len - 1}"):
            engine.add_request(new_request([2] * num_tokens, temperature=0.0))
    assert engine.answers == {} and engine.scheduler.waiting == []


@pytest.mark.parametrize("sizes", [{"num_blocks": 10**17}, {"block_size": 10**15}])
@pytest.mark.parametrize("make", [NumpyRunner, TorchRunner])
def test_a_cache_beyond_all_memory_is_refused(make, sizes):
    runner = make(RandomCheckpoint(), device="cpu")
    with pytest.raises(InputError, match="no memory for so large a cache"):
        Engine(runner, Letters(), EngineConfig(**sizes))

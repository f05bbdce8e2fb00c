"""How do many lengths share one memory? What is wasted, what is reused, and what does it cost?

Three answers. *Counted*: the same queue of requests goes through the same scheduler, holding its
keys and values in one piece (reserved for the model's context, or for the longest answer allowed)
or in blocks of several sizes; no model runs, since counting needs none. *Timed*: 16 prompts that
share a beginning, with and without prefix reuse. *Timed*: a token of one sequence, contiguous cache
against paged, where paging buys nothing and can only cost. Chapter folder: chapters/09_paged_cache.
"""

from __future__ import annotations

import random

import numpy as np
from tqdm import tqdm

from ..block_manager import BlockManager
from ..generate import generate
from ..loading.registry import fetch
from ..request import Request
from ..sampling_params import SamplingParams
from ..scheduler import Scheduler
from ..sequence import Sequence
from . import draw, is_fast
from .kv_cache import fill
from .workload import Lengths, describe_lengths, draw_lengths, pack, unpack

MODEL = "smollm2-135m-instruct"
BACKENDS = {"numpy": "NumPy", "torch": "torch"}
BLOCK_SIZES = (1, 4, 8, 16, 32, 64, 128)
CONTIGUOUS = {"context": "one piece, full context", "max_tokens": "one piece, max_tokens"}
PATTERNS = {"together": "all at once", "one by one": "one after the other"}
REUSE = {True: draw.BLUE, False: draw.ORANGE}
CACHES = {"contiguous": draw.ORANGE, "paged": draw.BLUE}

CONTEXT_LEN, NUM_CONTEXTS = 8192, 4  # the memory: so many tokens, so many times
MAX_TOKENS, SEED = 1024, 9
PROMPT_LENGTHS = Lengths(median=150, sigma=1.0, shortest=1, longest=4096)  # most are short
ANSWER_LENGTHS = Lengths(median=120, sigma=0.9, shortest=1, longest=MAX_TOKENS)

NUM_SHARING, PREFIX_TOKENS, OWN_TOKENS, NEW_TOKENS = 16, 1000, 40, 8  # the prompts that share
CONTEXTS = (64, 256, 1024, 2048, 4096)  # the one sequence


def measure():
    """The result, as JSON wants it."""
    num_requests, num_contexts = (48, 1) if is_fast() else (512, NUM_CONTEXTS)
    rounds = {"prefix": 1 if is_fast() else 3, "paging": 1 if is_fast() else 5}
    sharing = (3, 40, 8, 2) if is_fast() else (NUM_SHARING, PREFIX_TOKENS, OWN_TOKENS, NEW_TOKENS)
    contexts = (16, 32) if is_fast() else CONTEXTS
    return {
        "arguments": {"model": MODEL, "num_requests": num_requests, "seed": SEED,
                      **describe_lengths(PROMPT_LENGTHS, ANSWER_LENGTHS),
                      "memory_tokens": num_contexts * CONTEXT_LEN, "context_len": CONTEXT_LEN,
                      "max_tokens": MAX_TOKENS, "rounds": rounds, "block_size": 16,
                      **dict(zip(("num_sharing", "prefix_tokens", "own_tokens", "new_tokens"),
                                 sharing))},
        "memory": measure_memory(num_requests, num_contexts * CONTEXT_LEN),
        "prefix": measure_prefix(rounds["prefix"], *sharing),
        "paging": measure_paging(rounds["paging"], contexts, num_tokens=3 if is_fast() else 9),
    }


# ── Counted: who has room in the same memory ─────────────────────────────────────────────────


class ContiguousMemory:
    """A BlockManager's neighbour for comparison: one piece of memory for each sequence, reserved
    when it is admitted, in the first gap that is large enough.

    reserve(sequence): tokens to reserve. What is reserved suffices to the end, so whatever else may
    come, `num_spare_blocks` are not needed, and a sequence can always grow.
    """

    def __init__(self, num_tokens, reserve):
        self.num_tokens, self.reserve = num_tokens, reserve
        self.pieces = []  # (start, end, sequence), in the order of the addresses

    def gap(self, length):
        """Where so many tokens fit, or None."""
        start = 0
        for taken_from, taken_to, _ in self.pieces:
            if taken_from - start >= length:
                break
            start = taken_to
        return start if start + length <= self.num_tokens else None

    def can_admit(self, sequence, num_spare_blocks=0):
        return self.gap(self.reserve(sequence)) is not None

    def admit(self, sequence):
        length = self.reserve(sequence)
        start = self.gap(length)
        self.pieces.append((start, start + length, sequence))
        self.pieces.sort(key=lambda piece: piece[0])

    def release(self, sequence):
        self.pieces = [piece for piece in self.pieces if piece[2] is not sequence]

    def can_grow(self, sequence, num_tokens):
        return True

    def grow(self, sequence, num_tokens):
        """Nothing is to be done."""

    def begin_step(self):
        """Nothing is shared, so nothing waits to be computed."""

    def take_copies(self):
        return []

    @property
    def num_reserved_tokens(self):
        return sum(end - start for start, end, _ in self.pieces)


def measure_memory(num_requests, memory_tokens):
    prompts, answers = draw_lengths(num_requests, PROMPT_LENGTHS, ANSWER_LENGTHS, SEED)
    lengths = list(zip(prompts, answers))
    memories = {
        "context": ContiguousMemory(memory_tokens, lambda sequence: CONTEXT_LEN),
        "max_tokens": ContiguousMemory(
            memory_tokens, lambda sequence: len(sequence.request.prompt_token_ids) + MAX_TOKENS),
        **{str(size): BlockManager(memory_tokens // size, size, enable_prefix_caching=False)
           for size in BLOCK_SIZES}}
    samples = []
    for name, memory in tqdm(memories.items(), desc="paged_cache: memory", unit="memory"):
        sample = {"memory": name, **count(memory, lengths)}
        if name not in CONTIGUOUS:
            sample["prefix_tokens_reused"] = count_reused(int(name))
        samples.append(sample)
    return {"prompt_lengths": pack(prompts), "answer_lengths": pack(answers), "samples": samples}


def count(memory, lengths):
    """Serve the queue with room for everybody but in memory, and add up what every step holds,
    as long as somebody has to wait: behind that, it is no longer memory that is short."""
    scheduler = Scheduler(memory, len(lengths), max_num_batched_tokens=10**9)
    ends = {}
    for number, (num_prompt_tokens, num_answer_tokens) in enumerate(lengths):
        request = Request([0] * num_prompt_tokens, SamplingParams(max_tokens=MAX_TOKENS), ())
        sequence = Sequence(request, request.output.outputs[0], number,
                            getattr(memory, "block_size", 1))
        scheduler.add(sequence)
        ends[sequence.order] = num_prompt_tokens + num_answer_tokens
    counts = dict.fromkeys(("steps", "contended_steps", "running", "held_tokens",
                            "reserved_tokens", "preemptions", "longest_table"), 0)
    finished = 0
    while scheduler.waiting or scheduler.running:
        batch = scheduler.schedule()
        scheduler.update(batch)
        counts["steps"] += 1
        if scheduler.waiting:
            counts["contended_steps"] += 1
            counts["running"] += len(scheduler.running)
            counts["held_tokens"] += sum(each.num_computed_tokens for each in scheduler.running)
            counts["reserved_tokens"] += reserved_tokens(memory)
            counts["longest_table"] = max(counts["longest_table"], *(
                len(each.block_table.block_ids) for each in scheduler.running))
        for sequence in batch.sampling:
            sequence.token_ids.append(0)
            if len(sequence.token_ids) == ends[sequence.order]:
                counts["preemptions"] += sequence.num_preemptions
                finished += 1
                scheduler.remove(sequence)
    return counts | {"finished": finished}


def reserved_tokens(memory):
    """Tokens for which room is taken, with or without a token in it."""
    if isinstance(memory, ContiguousMemory):
        return memory.num_reserved_tokens
    return (memory.num_blocks - memory.num_available_blocks) * memory.block_size


def count_reused(block_size):
    """Of a prefix shared by two requests, the tokens that the second finds."""
    num_prompt_tokens = PREFIX_TOKENS + OWN_TOKENS
    blocks = BlockManager(2 * num_prompt_tokens, block_size)
    for number in range(2):
        own = [PREFIX_TOKENS + number] * OWN_TOKENS
        request = Request([*range(PREFIX_TOKENS), *own], SamplingParams(), ())
        sequence = Sequence(request, request.output.outputs[0], number, block_size)
        blocks.admit(sequence)
        blocks.grow(sequence, sequence.num_uncomputed_tokens)
    return sequence.num_cached_tokens


# ── Timed: a shared beginning ────────────────────────────────────────────────────────────────


def measure_prefix(rounds, num_sharing, prefix_tokens, own_tokens, new_tokens):
    from .. import LLM

    llms = {reuse: LLM(MODEL, enable_prefix_caching=reuse) for reuse in REUSE}
    num_tokens = prefix_tokens * len(PATTERNS) * (rounds + 1) + num_sharing * own_tokens
    text = fetch("shakespeare").read_text(encoding="utf-8")[10_000 : 10_000 + 8 * num_tokens]
    token_ids = llms[True].encode_prompt(text)
    own = [token_ids[start : start + own_tokens]
           for start in range(0, num_sharing * own_tokens, own_tokens)]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    prefixes = iter([token_ids[start : start + prefix_tokens] for start in
                     range(num_sharing * own_tokens, num_tokens, prefix_tokens)])
    warm_up = [next(prefixes)[: prefix_tokens // 2]]
    for llm in llms.values():
        llm.generate(warm_up, params)
    samples = []
    for number in tqdm(range(rounds), desc="paged_cache: prefix", unit="round"):
        for pattern in PATTERNS:
            prefix = next(prefixes)  # a new one: the last round's is still in the cache
            prompts = [prefix + each for each in own]
            for reuse, llm in llms.items():
                groups = [prompts] if pattern == "together" else [[prompt] for prompt in prompts]
                outputs = [output for group in groups for output in llm.generate(group, params)]
                samples.append({
                    "round": number, "pattern": pattern, "reuse": reuse,
                    "ttft_ms": [output.metrics.ttft_ms for output in outputs],
                    "num_cached_tokens": [output.metrics.num_cached_tokens for output in outputs],
                    "token_ids": [pack(output.token_ids) for output in outputs]})
    return {"device": llms[True].runner.device, "dtype": llms[True].runner.dtype,
            "samples": samples}


# ── Timed: one sequence, which has nothing to gain from blocks ───────────────────────────────


def measure_paging(rounds, contexts, num_tokens):
    from .. import LLM

    num_blocks = 2 * (max(contexts) // 16 + 1)
    llms = {name: LLM(MODEL, backend=name, dtype="float32", num_blocks=num_blocks)
            for name in BACKENDS}
    num_characters = 8 * max(contexts)
    text = fetch("shakespeare").read_text(encoding="utf-8")[10_000 : 10_000 + num_characters]
    prompt = llms["torch"].encode_prompt(text)[: max(contexts)]
    for llm in llms.values():
        # As after hours of service: a sequence's blocks lie anywhere.
        random.Random(SEED).shuffle(llm.engine.scheduler.blocks.free_block_ids)
        llm.generate([prompt], SamplingParams(max_tokens=1))  # from now on it is cached
    samples = []
    for number in tqdm(range(rounds), desc="paged_cache: paging", unit="round"):
        for backend, llm in llms.items():  # not in turns of a token: their threads would mix
            one_sequence(llm, "contiguous", prompt[: contexts[0]], num_tokens)  # wakes them up
            for context_len in contexts:
                for cache in CACHES:
                    metrics = one_sequence(llm, cache, prompt[:context_len], num_tokens)
                    samples.append({"round": number, "backend": backend, "cache": cache,
                                    "context": context_len, "itl_ms": metrics.itl_ms})
    return {"devices": {name: llm.runner.device for name, llm in llms.items()},
            "contexts": list(contexts), "samples": samples}


def one_sequence(llm, cache, prompt, num_tokens):
    """Metrics of an answer to a prompt whose keys are there already: paged, from the prefix cache;
    contiguous, random ones, since time does not depend on them."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    if cache == "paged":
        return llm.generate([prompt], params)[0].metrics
    contiguous = llm.runner.new_cache(len(prompt) + num_tokens)
    fill(contiguous, llm.runner, len(prompt) - 1)
    request = Request(prompt, params, llm.stop_token_ids)
    for _ in generate(llm.runner, llm.tokenizer, request, contiguous):  # as batching="none" does
        pass
    return request.output.metrics


# ── Drawn from the JSON ──────────────────────────────────────────────────────────────────────


def memory_rows(result):
    """[(label, requests at once, share of all memory, share of what is reserved, sample), ...]"""
    rows = []
    for sample in result["memory"]["samples"]:
        steps, label = sample["contended_steps"], sample["memory"]
        memory_tokens = result["arguments"]["memory_tokens"]
        rows.append((CONTIGUOUS.get(label, f"blocks of {label}"),
                     sample["running"] / max(1, steps),
                     sample["held_tokens"] / max(1, steps * memory_tokens),
                     sample["held_tokens"] / max(1, sample["reserved_tokens"]), sample))
    return rows


def ttft_ms(result, pattern, reuse):
    """[rounds, requests]"""
    return np.array([sample["ttft_ms"] for sample in result["prefix"]["samples"]
                     if (sample["pattern"], sample["reuse"]) == (pattern, reuse)])


def tpot_ms(result, backend, cache, context_len):
    """A round's mean, over the rounds."""
    return np.array([np.mean(sample["itl_ms"]) for sample in result["paging"]["samples"]
                     if (sample["backend"], sample["cache"], sample["context"])
                     == (backend, cache, context_len)])


def figure(result):
    picture, axes = draw.new_figure(2, 2, height=5.8)
    draw_memory(axes[0, 0], result)
    draw_paging(axes[0, 1], result)
    for axis, pattern in zip(axes[1], PATTERNS):
        draw_prefix(axis, result, pattern)
    return picture


def draw_memory(axis, result):
    rows = memory_rows(result)
    for y, (label, running, share, _, _) in enumerate(rows):
        is_paged = label not in CONTIGUOUS.values()
        axis.barh(y, 100 * share, color=draw.BLUE if is_paged else draw.ORANGE)
        axis.text(100 * share + 1, y, f"{running:.0f} at once", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 125)
    axis.set_xticks(range(0, 101, 25))
    axis.set_xlabel("memory that holds a token, %")
    axis.set_title("the same queue in the same memory, counted")


def draw_paging(axis, result):
    contexts = result["paging"]["contexts"]
    for backend, line in zip(BACKENDS, ("-", "--")):
        for cache, colour in CACHES.items():
            rounds = [tpot_ms(result, backend, cache, each) for each in contexts]
            axis.plot(contexts, [np.median(ms) for ms in rounds], line, color=colour,
                      label=f"{cache}, {BACKENDS[backend]}")
            for context_len, ms in zip(contexts, rounds):
                axis.plot([context_len] * len(ms), ms, ".", color=colour, markersize=3)
    axis.set_xscale("log")
    axis.set_xticks(contexts, contexts)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens before this one")
    axis.set_ylabel("TPOT, ms (dots: rounds)")
    axis.set_title("one sequence alone, float32")
    axis.legend(frameon=False, fontsize=7)


def draw_prefix(axis, result, pattern):
    for reuse, colour in REUSE.items():
        ms = ttft_ms(result, pattern, reuse)
        numbers = range(1, ms.shape[1] + 1)
        axis.plot(numbers, np.median(ms, axis=0), color=colour,
                  label="prefix reused" if reuse else "computed anew")
        for row in ms:
            axis.plot(numbers, row, ".", color=colour, markersize=3)
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"request ({result['arguments']['prefix_tokens']} tokens in common)")
    axis.set_ylabel("TTFT, ms (dots: rounds)")
    axis.set_title(f"a shared beginning, requests {PATTERNS[pattern]}")
    axis.legend(frameon=False)


def table(result):
    """Markdown: a row a memory, a row a pattern of arrival, a row a context length."""
    return "\n".join([*memory_table(result), "", *prefix_table(result), "", *paging_table(result),
                      "", machine_line(result)])


def memory_table(result):
    arguments = result["arguments"]
    prompts, answers = (unpack(result["memory"][f"{name}_lengths"])
                        for name in ("prompt", "answer"))
    heads = ["keys and values lie in", "requests at once", "memory that holds tokens",
             "of what is reserved", "steps for all", "preemptions", "longest table",
             f"reused of {PREFIX_TOKENS}"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for label, running, share, share_of_reserved, sample in memory_rows(result):
        cells = [f"{running:.1f}", f"{share:.1%}", f"{share_of_reserved:.1%}",
                 f"{sample['steps']}", f"{sample['preemptions']}",
                 str(sample["longest_table"] or "–"), str(sample.get("prefix_tokens_reused", "–"))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    num_tokens, sigmas = arguments["memory_tokens"], [arguments[name]["sigma"]
                                                      for name in ("prompt", "answer")]
    lines += ["", (
        f"Counted, while others waited: {arguments['num_requests']} requests in a memory of "
        f"{num_tokens} tokens, {num_tokens // CONTEXT_LEN} contexts of {CONTEXT_LEN}. Prompts of "
        f"{np.median(prompts):.0f} tokens in the median and {max(prompts):.0f} at most, answers of "
        f"{np.median(answers):.0f} and {max(answers):.0f}, max_tokens {arguments['max_tokens']}; "
        f"log-normal, σ {sigmas[0]:g} and {sigmas[1]:g}, seed {arguments['seed']}. Last column: "
        f"tokens of a prefix of {PREFIX_TOKENS} that a second request finds.")]
    return lines


def prefix_table(result):
    lines = ["| requests come | first, ms | second, × without reuse | later ones, ms | without "
             "reuse, ms | × without reuse |", "| --- | --- | --- | --- | --- | --- |"]
    for pattern, label in PATTERNS.items():
        ours, others = (ttft_ms(result, pattern, reuse) for reuse in REUSE)
        later, later_without = (np.median(each[:, 1:], axis=1) for each in (ours, others))
        second, ratios = ours[:, 1] / others[:, 1], later / later_without
        lines.append(f"| {label} | {spread(ours[:, 0])} | {np.median(second):.2f} | "
                     f"{spread(later)} | {spread(later_without)} | {np.median(ratios):.3f} "
                     f"({ratios.min():.3f}–{ratios.max():.3f}) |")
    arguments, prefix = result["arguments"], result["prefix"]
    cached = [sum(sample["num_cached_tokens"]) for sample in prefix["samples"] if sample["reuse"]]
    prompt_tokens = arguments["prefix_tokens"] + arguments["own_tokens"]
    lines += ["", (
        f"TTFT of {arguments['num_sharing']} prompts of {prompt_tokens} tokens, of which the first "
        f"{arguments['prefix_tokens']} are the same; blocks of {arguments['block_size']}; torch in "
        f"{prefix['dtype']} on {prefix['device']}. Later ones: the median of all but the first. "
        f"Medians of {arguments['rounds']['prefix']} interleaved rounds, ratios taken within a "
        f"round. Reuse found {' to '.join(map(str, sorted({min(cached), max(cached)})))} of "
        f"{arguments['num_sharing'] * prompt_tokens} prompt tokens; {same_tokens(prefix)}.")]
    return lines


def same_tokens(prefix):
    """How many answers are the same. (In bfloat16, another division of the work into steps can
    round two close logits the other way.)"""
    pairs = {}
    for sample in prefix["samples"]:
        pairs.setdefault((sample["round"], sample["pattern"]), []).append(sample["token_ids"])
    same = [ours == others for pair in pairs.values() for ours, others in zip(*pair)]
    return f"{sum(same)} of {len(same)} answers are the same with and without"


def paging_table(result):
    lines = ["| tokens before | " + " | ".join(
        f"{name}: contiguous, ms | paged, ms | × contiguous" for name in BACKENDS.values()) + " |",
        "| --- |" + " --- |" * 3 * len(BACKENDS)]
    for context_len in result["paging"]["contexts"]:
        cells = []
        for backend in BACKENDS:
            contiguous, paged = (tpot_ms(result, backend, cache, context_len) for cache in CACHES)
            cells += [spread(contiguous), spread(paged), f"{np.median(paged / contiguous):.2f}"]
        lines.append(f"| {context_len} | {' | '.join(cells)} |")
    arguments = result["arguments"]
    lines += ["", (
        "TPOT of one sequence in float32: chapter 07's loop and cache against the engine with "
        f"blocks of {arguments['block_size']} in random order; {arguments['rounds']['paging']} "
        "interleaved rounds, ratios taken within a round.")]
    return lines


def spread(values):
    """"104 (101–109)": the median, the smallest and the largest."""
    digits = 1 if np.median(values) < 100 else 0
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def machine_line(result):
    machine, devices = result["machine"], result["paging"]["devices"]
    device = machine["gpu"] if devices["torch"] != "cpu" else "the CPU"
    return (f"{machine['cores']} cores of {machine['cpu']}; torch on {device}; "
            f"{result['arguments']['model']}; torch {machine['versions']['torch']}, NumPy "
            f"{machine['versions']['numpy']}; {machine['date']}.")

"""What does continuous batching look like? A few requests, step by step.

Requests come before certain steps (not at certain moments, so that every machine shows the same
steps; only their widths differ), more than there are seats, into a cache that is a little too
small. So each thing that a scheduler does happens: prompts are cut, requests join and leave while
others go on, and one is preempted and computed again. Part of `bench load`; chapter
10_continuous_batching.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np

from . import draw, is_fast
from .open_loop import columns, make_requests, new_engine
from .workload import Lengths, cut_prompts, draw_lengths, pack, unpack

NUM_REQUESTS, SEATS, BUDGET, BLOCK_SIZE, NUM_BLOCKS = 12, 6, 64, 16, 36
PROMPTS = Lengths(median=48, sigma=0.9, shortest=8, longest=240)
ANSWERS = Lengths(median=24, sigma=0.7, shortest=6, longest=72)
STEPS_BETWEEN_ARRIVALS, SEED = 3.0, 12
COLUMNS = ("start_s", "end_s", "running", "waiting", "blocks")
COLOURS = {"prompt": draw.ORANGE, "again": draw.PINK, "answer": draw.BLUE, "waiting": draw.GREY}


def measure_timeline(llm, text_token_ids):
    """-> {"arguments": ..., "steps": ..., "scheduled": ..., "preempted": ..., "arrivals_s": ...}"""
    num_requests = 4 if is_fast() else NUM_REQUESTS
    prompt_tokens, answer_tokens = draw_lengths(num_requests, PROMPTS, ANSWERS, SEED)
    gaps = np.random.default_rng(SEED).exponential(STEPS_BETWEEN_ARRIVALS, num_requests - 1)
    arrival_steps = [0, *np.cumsum(gaps).astype(int).tolist()]
    engine = new_engine(llm, max_num_seqs=SEATS, max_num_batched_tokens=BUDGET,
                        block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    requests = make_requests(llm, cut_prompts(text_token_ids, prompt_tokens), answer_tokens)
    return {
        "arguments": {"requests": num_requests, "seats": SEATS, "budget": BUDGET,
                      "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "seed": SEED,
                      "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens,
                      "arrival_steps": arrival_steps},
        **watch(engine, requests, arrival_steps),
    }


def watch(engine, requests, arrival_steps):
    """Run them to the end.   arrival_steps: before which step each request comes, in order.

    scheduled: for every step, (request, number of tokens, is_prefill) of each sequence in it, one
    after the other.   preempted: [(step, request), ...].   arrivals_s: a time for each request.
    """
    steps, scheduled, preempted, arrivals_s, sequences = [], [], [], [], []
    blocks, start_s = engine.scheduler.blocks, time.perf_counter()
    while len(sequences) < len(requests) or engine.answers:
        begin_s = time.perf_counter() - start_s
        while len(sequences) < len(requests) and arrival_steps[len(sequences)] <= len(steps):
            request_id = engine.add_request(requests[len(sequences)])
            sequences.append(engine.answers[request_id][0].sequence)
            arrivals_s.append(begin_s)
        before = [sequence.num_preemptions for sequence in sequences]
        entries = engine.step().scheduled
        preempted += [(len(steps), number) for number, sequence in enumerate(sequences)
                      if sequence.num_preemptions > before[number]]
        scheduled.append(pack([int(each) for request_id, _, num, is_prefill in entries
                               for each in (request_id, num, is_prefill)]))
        steps.append((begin_s, time.perf_counter() - start_s, len(entries),
                      len(engine.scheduler.waiting),
                      blocks.num_blocks - blocks.num_available_blocks))
    return {"steps": columns(steps, COLUMNS), "scheduled": scheduled, "preempted": preempted,
            "arrivals_s": pack(arrivals_s)}


def pieces_of(part):
    """-> [(request, step, number of tokens, "prompt", "again" or "answer"), ...], in the order of
    the steps. "again" is what had been computed before a preemption, and the rest of its prompt."""
    lost, pieces = set(), []
    preempted = [tuple(each) for each in part["preempted"]]
    for step, line in enumerate(part["scheduled"]):
        lost |= {request for at, request in preempted if at == step}
        for request, num, is_prefill in unpack(line).astype(int).reshape(-1, 3).tolist():
            kind = "answer" if not is_prefill else "again" if request in lost else "prompt"
            pieces.append((request, step, num, kind))
    return pieces


def draw_timeline(axis, part):
    """A row a request: what of it each step computed."""
    steps = SimpleNamespace(**{name: unpack(text) for name, text in part["steps"].items()})
    pieces, arrivals_s = pieces_of(part), unpack(part["arrivals_s"])
    total_s, labelled = steps.end_s[-1], set()
    for request, arrival_s in enumerate(arrivals_s):
        last = max(step for each, step, *_ in pieces if each == request)
        axis.plot([arrival_s, steps.end_s[last]], [request, request], color="#bbbbbb",
                  linewidth=1, zorder=0, label="waiting" if request == 0 else None)
        axis.plot(arrival_s, request, "|", color="black", markersize=7)
    for request, step, num, kind in pieces:
        start_s, width = steps.start_s[step], steps.end_s[step] - steps.start_s[step]
        axis.barh(request, width, left=start_s, height=0.38 if kind == "answer" else 0.82,
                  color=COLOURS[kind], edgecolor="white", linewidth=0.3,
                  label=LABELS[kind] if kind not in labelled else None)
        labelled.add(kind)
        if kind != "answer" and width > 0.008 * total_s:
            axis.text(start_s + width / 2, request, num, ha="center", va="center", fontsize=5.5)
    for number, (step, request) in enumerate(part["preempted"]):
        axis.plot(steps.start_s[step], request, "X", color=draw.RED, markersize=8,
                  markeredgecolor="white", label="preempted" if number == 0 else None)
    axis.set_yticks(range(len(arrivals_s)), [f"{number + 1}" for number in range(len(arrivals_s))])
    axis.set_ylim(len(arrivals_s) - 0.4, -0.6)
    axis.set_xlim(0, total_s)
    axis.set_ylabel("requests, as they came")
    arguments = part["arguments"]
    axis.set_xlabel(f"seconds ({arguments['seats']} seats, at most {arguments['budget']} tokens a "
                    f"step, a cache of {arguments['num_blocks']} blocks of "
                    f"{arguments['block_size']} tokens)")


LABELS = {"prompt": "a piece of its prompt (tokens)", "again": "computed again",
          "answer": "a token of its answer"}


def draw_counts(axis, part):
    """Below it, on the same time axis: seats, queue and memory."""
    steps = SimpleNamespace(**{name: unpack(text) for name, text in part["steps"].items()})
    edges = [*steps.start_s, steps.end_s[-1]]
    axis.stairs(steps.running, edges, color=draw.BLUE, label="running")
    axis.stairs(steps.waiting, edges, color=draw.RED, label="waiting")
    axis.set_ylabel("requests")
    axis.set_xlim(0, edges[-1])
    axis.set_ylim(0, 1.5 * max(steps.running))
    memory = axis.twinx()
    memory.stairs(100 * steps.blocks / part["arguments"]["num_blocks"], edges, color=draw.GREEN,
                  fill=True, alpha=0.2, label="cache in use")
    memory.set_ylabel("% of the cache")
    memory.set_ylim(0, 150)
    memory.set_yticks([0, 50, 100])
    handles, labels = (mine + other for mine, other in zip(
        axis.get_legend_handles_labels(), memory.get_legend_handles_labels()))
    axis.legend(handles, labels, frameon=False, ncols=3, loc="upper left", fontsize=7)

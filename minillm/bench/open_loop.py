"""Requests that come when they come, whether or not the server keeps up: an open loop.

Every request has a moment at which it is due, and its clock starts then, also if the server is busy
and looks only later: a stalled server hides nothing (Schroeder et al. 2006, "Open Versus Closed";
what measures from the moment of sending commits "coordinated omission"). Time is real; between
steps, whoever is due joins. Chapter 10_continuous_batching shows what comes of it.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from .workload import pack

STEP_COLUMNS = ("end_s", "running", "waiting", "blocks", "preempted", "prefill_tokens",
                "decode_tokens")


def make_requests(llm, prompts, answer_tokens):
    """Greedy ones, whose answers have these lengths whatever the model says."""
    from .. import SamplingParams
    from ..request import Request

    return [Request(prompt, SamplingParams(temperature=0, max_tokens=num, ignore_eos=True),
                    llm.stop_token_ids) for prompt, num in zip(prompts, answer_tokens)]


def new_engine(llm, **config):
    """An engine on the model that llm has loaded. Prompts are pieces of one text and share nothing;
    what a run before this one computed must not help."""
    from ..engine import Engine, EngineConfig

    return Engine(llm.runner, llm.tokenizer, EngineConfig(enable_prefix_caching=False, **config))


class Doorway:
    """Lets requests in when they are due.

    arrivals_s: seconds from now, in order, one for each request
    """

    def __init__(self, requests, arrivals_s):
        self.start_s = time.perf_counter()
        self.due = deque()
        for request, arrival_s in zip(requests, arrivals_s):
            request.submitted_s = self.start_s + arrival_s
            self.due.append(request)

    def now_s(self):
        return time.perf_counter() - self.start_s

    def take(self, most=None):
        """-> the requests that are due by now, at most so many."""
        now_s, taken = time.perf_counter(), []
        while self.due and self.due[0].submitted_s <= now_s and len(taken) != most:
            taken.append(self.due.popleft())
        return taken

    def num_outside(self):
        """Those who are due and have not been let in."""
        now_s = time.perf_counter()
        return sum(request.submitted_s <= now_s for request in self.due)

    def wait(self):
        """Until the next one is due."""
        time.sleep(max(0.0, self.due[0].submitted_s - time.perf_counter()))


def serve_engine(engine, requests, arrivals_s):
    """Answer them with continuous batching;  -> a row for each step, its STEP_COLUMNS.

    running: sequences in the step.   waiting, blocks: after it, in number.   preempted: in this
    step.   prefill_tokens, decode_tokens: rows of the step, of prompts (and of what is computed
    again) and of answers.
    """
    door, steps, sequences, num_preempted = Doorway(requests, arrivals_s), [], [], 0
    blocks = engine.scheduler.blocks
    while door.due or engine.answers:
        for request in door.take():
            request_id = engine.add_request(request)
            sequences.append(engine.answers[request_id][0].sequence)
        if not engine.answers:
            door.wait()
            continue
        scheduled = engine.step().scheduled
        num_before = num_preempted
        num_preempted = sum(sequence.num_preemptions for sequence in sequences)
        num_prefill = sum(num for *_, num, is_prefill in scheduled if is_prefill)
        num_rows = sum(num for *_, num, _ in scheduled)
        steps.append((door.now_s(), len(scheduled),
                      len(engine.scheduler.waiting) + door.num_outside(),
                      blocks.num_blocks - blocks.num_available_blocks, num_preempted - num_before,
                      num_prefill, num_rows - num_prefill))
    return steps


def serve_static(llm, requests, arrivals_s, seats):
    """Answer them in static batches: whoever waits when the last batch has ended, at most as many
    as there are seats;  -> [(end_s, running, waiting), ...], a row for each batch."""
    from ..batching import generate_static

    door, batches = Doorway(requests, arrivals_s), []
    while door.due:
        batch = door.take(seats)
        if not batch:
            door.wait()
            continue
        generate_static(llm.runner, llm.tokenizer, batch)
        batches.append((door.now_s(), len(batch), door.num_outside()))
    return batches


def record(requests):
    """Seconds from each request's arrival to each of its tokens, packed: a line a request."""
    times_s = []
    for request in requests:
        metrics = request.output.metrics
        times_s.append(pack((np.cumsum([metrics.ttft_ms, *metrics.itl_ms]) / 1000).tolist()))
    return times_s


def columns(rows, names):
    """-> {name: that column of all rows, packed}."""
    return {name: pack(column) for name, column in zip(names, zip(*rows))}

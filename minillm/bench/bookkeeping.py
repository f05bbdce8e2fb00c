"""How much of a step is Python? The engine's bookkeeping beside the model's tensor operations.

A step is timed in parts, while so many requests decode: `Scheduler.schedule`, which lays the batch
out, the index arrays of the paged cache, the forward pass, the best tokens, and `Engine.update`,
which turns tokens into text. Part of `bench throughput`; chapter 10_continuous_batching. Left out:
steps that take prompts in, which have fewer sequences for as many rows.
"""

from __future__ import annotations

import time

import numpy as np

from . import is_fast
from .workload import MODEL, cut_prompts, read_text

QUANTIZE = "w8a8"
NUMS_RUNNING = (8, 64, 256)
PROMPT_TOKENS, TIMED_STEPS = 16, 24
TENSOR_PARTS = ("forward", "best_tokens")  # the rest of a step is bookkeeping


class Stopwatch:
    """Sums up the seconds that are spent in methods of objects, each under a name."""

    def __init__(self):
        self.seconds = {}

    def watch(self, owner, method):
        function = getattr(owner, method)

        def timed(*arguments):
            start_s = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds[method] += time.perf_counter() - start_s

        self.seconds[method] = 0.0
        setattr(owner, method, timed)

    def take(self):
        """-> {method: seconds} since the last time."""
        taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return taken


def measure_bookkeeping():
    """-> {"quantize": ..., "steps": [{"running": ..., "step_s": ..., a part's name: s}, ...]}"""
    from .. import LLM

    nums_running, num_steps = ((2, 4), 3) if is_fast() else (NUMS_RUNNING, TIMED_STEPS)
    llm = LLM(MODEL, device="cpu", quantize=QUANTIZE, max_num_seqs=max(nums_running),
              enable_prefix_caching=False)
    engine, watch, steps = llm.engine, Stopwatch(), []
    for owner, method in ((engine.scheduler, "schedule"), (engine.cache, "step"),
                          (llm.runner, "forward"), (llm.runner, "best_tokens"),
                          (engine, "update")):
        watch.watch(owner, method)
    text_token_ids = read_text()
    for num_running in nums_running:
        prompts = cut_prompts(text_token_ids, [PROMPT_TOKENS] * num_running)
        steps += time_steps(llm, engine, watch, prompts, num_steps)
    return {"quantize": QUANTIZE, "prompt_tokens": PROMPT_TOKENS, "steps": steps}


def time_steps(llm, engine, watch, prompts, num_steps):
    """The parts of num_steps steps in which every prompt's answer goes on by one token."""
    from .. import SamplingParams
    from ..request import Request

    params = SamplingParams(temperature=0, max_tokens=4096, ignore_eos=True)
    request_ids = [engine.add_request(Request(prompt, params, llm.stop_token_ids))
                   for prompt in prompts]
    steps = []
    while len(steps) < num_steps + 1:  # the first of them all warms up
        watch.take()
        start_s = time.perf_counter()
        scheduled = engine.step().scheduled
        step_s = time.perf_counter() - start_s
        if len(scheduled) == len(prompts) and not any(is_prefill for *_, is_prefill in scheduled):
            parts = {name: round(seconds, 6) for name, seconds in watch.take().items()}
            steps.append({"running": len(prompts), "step_s": round(step_s, 6), **parts})
    for request_id in request_ids:
        engine.abort(request_id)
    return steps[1:]


def shares(result, running):
    """-> {part: its share of a step, the median over the steps with so many running}, with "rest"
    for what no part accounts for, and "bookkeeping" for all but the tensor operations."""
    steps = [step for step in result["steps"] if step["running"] == running]
    parts = [name for name in steps[0] if name not in ("running", "step_s")]
    found = {name: float(np.median([step[name] / step["step_s"] for step in steps]))
             for name in parts}
    found["rest"] = float(np.median(
        [1 - sum(step[name] for name in parts) / step["step_s"] for step in steps]))
    found["bookkeeping"] = float(np.median(bookkeeping_shares(result, running)))
    return found


def bookkeeping_shares(result, running):
    """Of each step."""
    return [1 - sum(step[name] for name in TENSOR_PARTS) / step["step_s"]
            for step in result["steps"] if step["running"] == running]

"""What do those who are being answered notice when a very long prompt comes in?

Eight requests decode. Then a prompt of 4000 tokens joins. In one piece it takes the whole step, and
everybody waits for it; in pieces of a smaller budget, everybody gets a token between two pieces,
and the newcomer pays for that. (Agrawal et al. 2024, "Sarathi-Serve", §4.) Part of `bench load`;
chapter 10_continuous_batching.
"""

from __future__ import annotations

import time

import numpy as np
from tqdm import tqdm

from ..metrics import percentiles
from . import is_fast
from .open_loop import make_requests, new_engine
from .workload import cut_prompts, pack, unpack

BUDGETS = (4096, 512, 256, 128, 64)  # tokens a step; the first takes the whole prompt
NUM_RUNNING, PROMPT_TOKENS, LONG_PROMPT_TOKENS = 8, 40, 4000
ROUNDS, STEPS_BEFORE, STEPS_AFTER = 3, 12, 12


def measure_long_prompt(llm, text_token_ids):
    """-> {"arguments": ..., "samples": [...]}, budgets in turns."""
    budgets, rounds, num_running, num_tokens = (
        ((64, 16), 1, 2, 50) if is_fast() else
        (BUDGETS, ROUNDS, NUM_RUNNING, LONG_PROMPT_TOKENS))
    *prompts, long_prompt = cut_prompts(text_token_ids, [PROMPT_TOKENS] * num_running
                                        + [num_tokens])
    samples = []
    turns = [(number, budget) for number in range(rounds) for budget in budgets]
    for number, budget in tqdm(turns, desc="a long prompt comes in", unit="turn"):
        samples.append({"budget": budget, "round": number,
                        **interrupt(llm, prompts, long_prompt, budget)})
    return {
        "arguments": {"running": num_running, "prompt_tokens": PROMPT_TOKENS,
                      "long_prompt_tokens": num_tokens, "rounds": rounds, "budgets": budgets,
                      "steps_before": STEPS_BEFORE, "steps_after": STEPS_AFTER},
        "samples": samples,
    }


def interrupt(llm, prompts, long_prompt, budget):
    """-> when the long prompt came, when its first token came, and when those came of a request
    that was running; all running ones have their tokens in the same steps."""
    engine = new_engine(llm, max_num_seqs=len(prompts) + 1, max_num_batched_tokens=budget)
    running = make_requests(llm, prompts, [llm.context_len - PROMPT_TOKENS] * len(prompts))
    ids = [engine.add_request(request) for request in running]
    start_s = time.perf_counter()
    while not all(request.output.token_ids for request in running):
        engine.step()
    for _ in range(STEPS_BEFORE):
        engine.step()
    newcomer, = make_requests(llm, [long_prompt], [STEPS_AFTER])
    ids.append(engine.add_request(newcomer))
    answer = engine.answers[ids[-1]][0]
    while engine.is_unfinished(ids[-1]):
        engine.step()
    times_s = engine.answers[ids[0]][0].token_times_s
    for request_id in ids:
        engine.abort(request_id)
    arrival_s, first_token_s = (each - start_s for each in (
        newcomer.submitted_s, answer.token_times_s[0]))
    return {"arrival_s": round(arrival_s, 5), "first_token_s": round(first_token_s, 5),
            "token_times_s": pack([each - start_s for each in times_s])}


def gaps_of(sample):
    """-> token times of a running request, in seconds from the long prompt's arrival, and the gap
    before each, in ms."""
    times_s = unpack(sample["token_times_s"]) - sample["arrival_s"]
    return times_s[1:], 1000 * np.diff(times_s)


def experience(part, budget):
    """-> p99 ITL of a running request while the prompt came in, its median ITL before, and the
    newcomer's TTFT, all in ms: three lists, a number a round."""
    p99_ms, before_ms, ttft_ms = [], [], []
    for sample in part["samples"]:
        if sample["budget"] == budget:
            ends_s, gaps_ms = gaps_of(sample)
            prefill_s = sample["first_token_s"] - sample["arrival_s"]
            # The token of the step that ends the prefill bears the same time; half a ms is room
            # for the rounding.
            while_prefill = (ends_s > 0) & (ends_s < prefill_s + 5e-4)
            p99_ms.append(percentiles(gaps_ms[while_prefill])[99])
            before_ms.append(float(np.median(gaps_ms[ends_s <= 0])))
            ttft_ms.append(1000 * prefill_s)
    return p99_ms, before_ms, ttft_ms

"""How long do people wait, when they come at their own times?

1. A timeline of a dozen requests, on which one can see what continuous batching does
   (`timeline.py`).
2. Load: requests of mixed lengths (`workload.py`) come in a Poisson process, at several fractions
   of the rate that the engine can just serve. The same requests come at the same moments to a
   static batch, to continuous batching that takes each prompt whole, and to one that cuts prompts
   (`open_loop.py`).
3. A prompt of 4000 tokens comes in while others are being answered (`long_prompt.py`).

All in one process, on one copy of the weights. Chapter folder: chapters/10_continuous_batching.
`load_report.py` has its table and figure.
"""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from . import is_fast
from .load_report import figure, table  # noqa: F401, what draw.publish asks this module for
from .long_prompt import measure_long_prompt
from .open_loop import (
    STEP_COLUMNS,
    columns,
    make_requests,
    new_engine,
    record,
    serve_engine,
    serve_static,
)
from .timeline import measure_timeline
from .workload import (
    ANSWER_LENGTHS,
    FAST_LENGTHS,
    MODEL,
    PROMPT_LENGTHS,
    TEXT,
    arrival_times,
    cut_prompts,
    describe_lengths,
    draw_lengths,
    pack,
    read_text,
)

QUANTIZE = "w8a8"
NUM_REQUESTS, SEATS, RATES, SEED = 64, 16, (0.4, 0.6, 0.8, 0.95), 0
WHOLE_PROMPTS = 8192  # tokens a step: more than all prompts that can come together
VARIANTS = {"static": None, "continuous": WHOLE_PROMPTS, "continuous, chunked": 128}
MAX_TTFT_MS, MAX_TPOT_MS = 1000, 150  # what goodput asks for


def measure():
    """The result, as JSON wants it."""
    from .. import LLM

    llm = LLM(MODEL, device="cpu", quantize=QUANTIZE)
    text_token_ids = read_text()
    return {
        "model": MODEL, "text": TEXT, "quantize": QUANTIZE,
        "load": measure_load(llm, text_token_ids),
        "long_prompt": measure_long_prompt(llm, text_token_ids),
        "timeline": measure_timeline(llm, text_token_ids),
    }


def measure_load(llm, text_token_ids):
    num_requests, seats, rates, lengths = (
        (4, 2, (0.5, 0.9), (FAST_LENGTHS, FAST_LENGTHS)) if is_fast() else
        (NUM_REQUESTS, SEATS, RATES, (PROMPT_LENGTHS, ANSWER_LENGTHS)))
    prompt_tokens, answer_tokens = draw_lengths(num_requests, *lengths, SEED)
    prompts = cut_prompts(text_token_ids, prompt_tokens)
    serve(llm, "static", prompts[:seats], [2] * len(prompts[:seats]), [0.0] * seats, seats)
    runs = [serve(llm, "continuous, chunked", prompts, answer_tokens, [0.0] * num_requests, seats)]
    capacity = measure_capacity(runs[0].pop("rows"), prompt_tokens, answer_tokens)
    turns = [(share, variant) for share in rates for variant in VARIANTS]
    for share, variant in tqdm(turns, desc="load", unit="run"):
        arrivals_s = arrival_times(num_requests, share * capacity, seed=SEED)
        run = serve(llm, variant, prompts, answer_tokens, arrivals_s, seats)
        run.pop("rows")
        runs.append({"share": share, "arrivals_s": pack(arrivals_s), **run})
    return {
        "arguments": {"requests": num_requests, "seats": seats, "seed": SEED, "burstiness": 1.0,
                      "lengths": describe_lengths(*lengths), "shares": rates,
                      "max_num_batched_tokens": VARIANTS,
                      "max_ttft_ms": MAX_TTFT_MS, "max_tpot_ms": MAX_TPOT_MS},
        "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens,
        "capacity": capacity,
        "runs": runs[1:],
    }


def serve(llm, variant, prompts, answer_tokens, arrivals_s, seats):
    """One run;  -> its samples, and its steps (or batches) as they were counted."""
    requests, budget = make_requests(llm, prompts, answer_tokens), VARIANTS[variant]
    if budget is None:
        rows = serve_static(llm, requests, arrivals_s, seats)
        names = ("end_s", "running", "waiting")
    else:
        engine = new_engine(llm, max_num_seqs=seats, max_num_batched_tokens=budget)
        rows, names = serve_engine(engine, requests, arrivals_s), STEP_COLUMNS
    return {"variant": variant, "token_times_s": record(requests), "steps": columns(rows, names),
            "rows": rows}


def measure_capacity(steps, prompt_tokens, answer_tokens):
    """Requests/s that the engine can serve without end: the rows that it computed a second as long
    as somebody waited for a seat, by the rows that a request takes.

    steps: of a run in which all requests are there from the start
    """
    counted = np.array(steps)
    end_s, waiting, rows = counted[:, 0], counted[:, 2], counted[:, -2] + counted[:, -1]
    num_busy = max(1, int(np.count_nonzero(waiting)))  # steps until the last one got its seat
    rows_a_request = (sum(prompt_tokens) + sum(answer_tokens)) / len(prompt_tokens) - 1
    return float(rows[:num_busy].sum() / end_s[num_busy - 1] / rows_a_request)

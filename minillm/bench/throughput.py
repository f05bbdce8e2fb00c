"""How many tokens a second, when there is more than one request?

1. At once: so many prompts of 40 tokens come together, and each wants 48 tokens. Every contestant
   answers in a process of its own, and they take turns. llama.cpp decodes parallel sequences,
   transformers one padded batch.
2. Mixed lengths: more requests than seats, of unequal lengths (`workload.py`). A static batch waits
   for its longest answer; continuous batching gives a seat away as soon as it is free.
3. Bookkeeping: what the Python of a step costs beside the model (`bookkeeping.py`).

Chapter folder: chapters/10_continuous_batching. `throughput_report.py` has its table and figure.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tqdm import tqdm

from . import is_fast
from .bookkeeping import measure_bookkeeping
from .engines import Minillm, Transformers, in_process, open_workers
from .llamacpp import LLAMA_CPP, LlamaCppParallel, has_llama_cpp, requantize
from .peers import measure_peer_limits
from .throughput_report import figure, table  # noqa: F401, what draw.publish asks this module for
from .workload import (
    ANSWER_LENGTHS,
    FAST_LENGTHS,
    MODEL,
    PROMPT_LENGTHS,
    TEXT,
    cut_prompts,
    describe_lengths,
    draw_lengths,
    pack,
    read_text,
)

REQUIRED_TO_PUBLISH = {"llama_cpp": LLAMA_CPP}
SIZES, PROMPT_TOKENS, ANSWER_TOKENS, WARM_UP_TOKENS = (1, 8, 32), 40, 48, 8
NUM_REQUESTS, SEATS, ROUNDS = 48, 16, 3

# name: (class, its arguments after the model, those by name, bits a weight as in peers.py)
AT_ONCE = {
    "minillm w8a8": (Minillm, ("torch", "auto", "w8a8"), {}, (8.05, 8.5)),
    "minillm int4": (Minillm, ("torch", "auto", "int4"), {}, (5.0, 8.5)),
    "minillm native": (Minillm, ("torch", "auto", "native"), {}, (5.0, 8.5)),
    "minillm bf16": (Minillm, ("torch", "bfloat16"), {}, (16, 16)),
    "minillm fp32": (Minillm, ("torch", "float32"), {}, (32, 32)),
    "minillm NumPy fp32": (Minillm, ("numpy", "float32"), {}, (32, 32)),
    "minillm static w8a8": (Minillm, ("torch", "auto", "w8a8"), {"batching": "static"},
                            (8.05, 8.5)),
    "llama.cpp Q4_0": (LlamaCppParallel, (), {}, (4.5, 8.5)),
    "llama.cpp Q4_1": (LlamaCppParallel, (), {}, (5.0, 8.5)),
    "llama.cpp Q8_0": (LlamaCppParallel, (), {}, (8.5, 8.5)),
    "transformers bf16": (Transformers, ("bfloat16",), {}, (16, 16)),
    "transformers fp32": (Transformers, ("float32",), {}, (32, 32)),
}
FAST_AT_ONCE = ("minillm w8a8", "minillm fp32", "minillm NumPy fp32", "llama.cpp Q4_1")
# Who is far behind the fastest is asked in the first round only, or it would be most of the run.
SLOW = ("minillm NumPy fp32", "minillm bf16", "minillm fp32", "transformers bf16",
        "transformers fp32", "minillm static fp32", "minillm continuous fp32",
        "transformers static bf16")
REQUANTIZED = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q8_0": "Q8_0"}  # by llama.cpp
MIXED = {  # all with the same number of seats
    "minillm static w8a8": (Minillm, ("torch", "auto", "w8a8"), {"batching": "static"}),
    "minillm continuous w8a8": (Minillm, ("torch", "auto", "w8a8"), {}),
    "minillm static fp32": (Minillm, ("torch", "float32"), {"batching": "static"}),
    "minillm continuous fp32": (Minillm, ("torch", "float32"), {}),
    "transformers static bf16": (Transformers, ("bfloat16",), {}),
}
FAST_MIXED = ("minillm static w8a8", "minillm continuous w8a8")


def measure():
    """The result, as JSON wants it."""
    text_token_ids = read_text()
    is_complete = has_llama_cpp()
    names = [name for name in (FAST_AT_ONCE if is_fast() else AT_ONCE)
             if is_complete or AT_ONCE[name][0] is not LlamaCppParallel]
    return {
        "model": MODEL, "text": TEXT,
        "at_once": measure_at_once(names, text_token_ids),
        "mixed": measure_mixed(text_token_ids),
        "bookkeeping": in_process(measure_bookkeeping),
        "limits": in_process(measure_peer_limits),
    }


def measure_at_once(names, text_token_ids):
    sizes, rounds, num_prompt_tokens, num_tokens = ((1, 3), 2, 8, 4) if is_fast() else (
        SIZES, ROUNDS, PROMPT_TOKENS, ANSWER_TOKENS)
    questions = {B: (cut_prompts(text_token_ids, [num_prompt_tokens] * B), [num_tokens] * B)
                 for B in sizes}
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(names, Path(folder))
        entries = {name: (AT_ONCE[name][0], files[name], *AT_ONCE[name][1]) for name in names}
        with open_workers(entries, {name: AT_ONCE[name][2] for name in names}) as workers:
            for prompts, _ in tqdm(questions.values(), desc="warm up", leave=False):
                for worker in workers.values():
                    worker.answer_many(prompts, [min(num_tokens, WARM_UP_TOKENS)] * len(prompts))
            samples, answers = ask_in_turns(workers, rounds, questions)
    return {
        "arguments": {"sizes": sizes, "rounds": rounds, "prompt_tokens": num_prompt_tokens,
                      "answer_tokens": num_tokens},
        "contestants": {name: {"bits": AT_ONCE[name][3]} for name in names},
        "answers": {name: [pack(answer) for answer in answers[name, sizes[1]]] for name in names},
        "samples": samples,
    }


def make_files(names, folder):
    """-> {contestant: the model that it loads}, after making those that llama.cpp has to make."""
    files = dict.fromkeys(names, MODEL)
    for name in tqdm([each for each in names if each in REQUANTIZED], desc="requantize"):
        files[name] = folder / f"{REQUANTIZED[name]}.gguf"
        requantize(MODEL, files[name], REQUANTIZED[name])
    return files


def ask_in_turns(workers, rounds, questions):
    """Every worker is asked every question in every round, or in the first one if it is slow.

    questions: {key: (prompts, number of tokens of each answer)}
    -> samples, {(name, key): the answers}
    """
    samples, answers = [], {}
    turns = [(number, key, name) for number in range(rounds) for key in questions
             for name in workers if number == 0 or name not in SLOW]
    for number, key, name in tqdm(turns, desc="take turns", unit="turn"):
        answers[name, key], seconds, num_rows = workers[name].answer_many(*questions[key])
        samples.append({"contestant": name, "question": key, "round": number,
                        "seconds": round(seconds, 5), "rows": num_rows})
    return samples, answers


def measure_mixed(text_token_ids):
    num_requests, seats, rounds, lengths = (
        (5, 2, 2, (FAST_LENGTHS, FAST_LENGTHS)) if is_fast() else
        (NUM_REQUESTS, SEATS, ROUNDS, (PROMPT_LENGTHS, ANSWER_LENGTHS)))
    prompt_tokens, answer_tokens = draw_lengths(num_requests, *lengths)
    prompts = cut_prompts(text_token_ids, prompt_tokens)
    names = FAST_MIXED if is_fast() else MIXED
    entries = {name: (MIXED[name][0], MODEL, *MIXED[name][1]) for name in names}
    options = {name: {"max_num_seqs": seats, **MIXED[name][2]} for name in names}
    with open_workers(entries, options) as workers:
        for worker in workers.values():  # warm-up
            worker.answer_many(prompts[:seats], [2] * len(prompts[:seats]))
        samples, _ = ask_in_turns(workers, rounds, {"mixed": (prompts, answer_tokens)})
    return {
        "arguments": {"requests": num_requests, "seats": seats, "rounds": rounds,
                      "lengths": describe_lengths(*lengths)},
        "contestants": {name: {"is_static": "static" in name} for name in names},
        "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens,
        "samples": samples,
    }

"""How fast is minillm beside other engines, on the same machine, in the same run?

Every contestant answers in a process of its own, so that no library's threads or memory disturb
another's; the processes take turns, A B C A B C …, so that a noisy minute hits all of them. One
turn is a greedy answer of 128 tokens to a prompt of 41, and a first token after a prompt of 512.
Chapter folder: chapters/peers.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import time

import numpy as np
from tqdm import tqdm

from ..loading.registry import fetch, resolve
from . import draw, is_fast
from .machine import flops, flops_numpy, read_bandwidth

MODEL = "smollm2-135m-instruct"
DECODE_PROMPT_TOKENS, DECODE_TOKENS, PREFILL_TOKENS = 41, 128, 512


class Minillm:
    """This project, through its public interface."""

    def __init__(self, backend, dtype):
        from .. import LLM, SamplingParams

        self.llm = LLM(MODEL, backend=backend, device="cpu", dtype=dtype)
        self.params = lambda num: SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)

    def answer(self, prompt_token_ids, num_tokens):
        """-> token ids, and the seconds from submission to each of them."""
        output = self.llm.generate([prompt_token_ids], self.params(num_tokens))[0]
        gaps_ms = [output.metrics.ttft_ms, *output.metrics.itl_ms]
        return output.token_ids, running_sum([gap / 1000 for gap in gaps_ms])


class Transformers:
    """Hugging Face transformers: the same file, dequantized by it, and its own generate()."""

    def __init__(self, dtype):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        path = resolve(MODEL)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None  # as ignore_eos: exactly num_tokens

    def answer(self, prompt_token_ids, num_tokens):
        import torch

        clock = TokenClock()
        with torch.inference_mode():
            ids = self.model.generate(torch.tensor([prompt_token_ids]), max_new_tokens=num_tokens,
                                      do_sample=False, streamer=clock,
                                      attention_mask=torch.ones(1, len(prompt_token_ids)))
        return ids[0, len(prompt_token_ids):].tolist(), clock.times_s


class TokenClock:
    """What generate() calls a streamer: told of the prompt, then of every token as it comes."""

    def __init__(self):
        self.start_s = time.perf_counter()
        self.times_s = []
        self.seen_prompt = False

    def put(self, value):
        if self.seen_prompt:
            self.times_s.append(time.perf_counter() - self.start_s)
        self.seen_prompt = True

    def end(self):
        """generate() announces the end; nothing is left to do."""


# name: (class, its arguments, the dtype it computes in)
CONTESTANTS = {
    "minillm torch bf16": (Minillm, ("torch", "bfloat16"), "bfloat16"),
    "transformers bf16": (Transformers, ("bfloat16",), "bfloat16"),
    "minillm torch fp32": (Minillm, ("torch", "float32"), "float32"),
    "minillm NumPy fp32": (Minillm, ("numpy", "float32"), "float32"),
    "transformers fp32": (Transformers, ("float32",), "float32"),
}


def measure():
    """The result, as JSON wants it."""
    rounds = 2 if is_fast() else 7
    num_tokens = 4 if is_fast() else DECODE_TOKENS
    text_token_ids = read_prompt()
    decode_prompt = text_token_ids[:DECODE_PROMPT_TOKENS]
    prefill_prompt = text_token_ids[: 64 if is_fast() else PREFILL_TOKENS]

    limits = in_process(measure_limits)
    workers = {name: Worker(name) for name in CONTESTANTS}
    samples, answers = [], {}
    try:
        for worker in workers.values():  # warm-up: allocators, thread pools, first-call set-up
            worker.answer(decode_prompt, 4)
            worker.answer(prefill_prompt, 1)
        turns = [(number, name) for number in range(rounds) for name in workers]
        for number, name in tqdm(turns, desc="peers", unit="turn"):
            token_ids, times_s = workers[name].answer(decode_prompt, num_tokens)
            _, prefill_times_s = workers[name].answer(prefill_prompt, 1)
            answers[name] = token_ids
            samples.append({"contestant": name, "round": number, "token_times_s": times_s,
                            "prefill_s": prefill_times_s[0]})
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "arguments": {"model": MODEL, "rounds": rounds,
                      "decode_prompt_tokens": len(decode_prompt), "decode_tokens": num_tokens,
                      "prefill_tokens": len(prefill_prompt)},
        "limits": limits,
        "dtypes": {name: dtype for name, (_, _, dtype) in CONTESTANTS.items()},
        "answers": answers,
        "samples": samples,
    }


def read_prompt():
    """The beginning of Macbeth, in the model's tokens."""
    from ..loading import open_checkpoint

    tokenizer = open_checkpoint(resolve(MODEL)).tokenizer()
    text = fetch("macbeth").read_text(encoding="utf-8")
    return tokenizer.encode(text[: 8 * PREFILL_TOKENS])


def measure_limits():
    """Bandwidth and arithmetic of this machine, and what a token of this model needs of them."""
    from ..loading import open_checkpoint

    config = open_checkpoint(resolve(MODEL)).config
    (H, K, D), C = config.heads, config.hidden_size
    layer_params = C * (H + 2 * K) * D + H * D * C + 3 * C * config.intermediate_size
    return {
        "read_bytes_per_s": read_bandwidth(),
        "flops_per_s": {"float32": max(flops("float32"), flops_numpy()),
                        "bfloat16": flops("bfloat16")},
        # Norms are left out (a ten-thousandth). The tied embedding is read once, as the head.
        "layer_params": config.num_hidden_layers * layer_params,
        "head_params": config.vocab_size * C,
    }


class Worker:
    """A contestant in a process of its own, asked one question at a time."""

    def __init__(self, name):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, prompt_token_ids, num_tokens):
        self.pipe.send((prompt_token_ids, num_tokens))
        return self.pipe.recv()

    def close(self):
        self.pipe.close()  # which ends `serve`
        self.process.join()


def serve(name, pipe):
    """Runs in the worker's process, until the pipe closes."""
    make, arguments, _ = CONTESTANTS[name]
    contestant = make(*arguments)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        pipe.send(contestant.answer(*question))


def in_process(function):
    """function(), in a process that ends with it: its threads and memory are gone afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def running_sum(numbers):
    total, sums = 0.0, []
    for number in numbers:
        total += number
        sums.append(total)
    return sums


def figure(result):
    """Decode and prefill speed of every contestant, with the machine's limits."""
    picture, axes = draw.new_figure(1, 2, height=3.0)
    rows = rows_of(result)
    prefill_title = f"prefill of {result['arguments']['prefill_tokens']}"
    for axis, key, title in zip(axes, ("decode", "prefill"), ("decode, 1 sequence", prefill_title)):
        for y, row in enumerate(rows):
            colour = draw.BLUE if row["name"].startswith("minillm") else draw.ORANGE
            axis.barh(y, row[key], color=colour, height=0.62)
            axis.plot(row[f"{key}_samples"], [y] * len(row[f"{key}_samples"]), ".", color="black",
                      markersize=3)
            axis.plot([row[f"{key}_limit"]] * 2, [y - 0.4, y + 0.4], color=draw.GREEN, linewidth=2)
            axis.text(max(row[f"{key}_samples"]), y, f"  {row[key]:.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s (median; dots: rounds; green: limit)")
        axis.set_title(title)
    axes[1].set_yticklabels([])
    return picture


def rows_of(result):
    """One row a contestant: medians, samples and limits, in tokens/s."""
    limits, prefill_tokens = result["limits"], result["arguments"]["prefill_tokens"]
    rows = []
    for name, dtype in result["dtypes"].items():
        samples = [sample for sample in result["samples"] if sample["contestant"] == name]
        decode = [(len(times) - 1) / (times[-1] - times[0])
                  for times in (sample["token_times_s"] for sample in samples)]
        prefill = [prefill_tokens / sample["prefill_s"] for sample in samples]
        layers, head = limits["layer_params"], limits["head_params"]
        token_bytes = (layers + head) * (2 if dtype == "bfloat16" else 4)
        prefill_flops = 2 * (layers * prefill_tokens + head)
        rows.append({
            "name": name, "dtype": dtype,
            "decode": float(np.median(decode)), "decode_samples": decode,
            "decode_limit": limits["read_bytes_per_s"] / token_bytes,
            "prefill": float(np.median(prefill)), "prefill_samples": prefill,
            "prefill_limit": prefill_tokens * limits["flops_per_s"][dtype] / prefill_flops,
        })
    return rows


def table(result):
    """Markdown; every ratio is the median over the rounds of the ratio within a round."""
    rows = {row["name"]: row for row in rows_of(result)}
    lines = ["| | decode, tok/s | × transformers | prefill, tok/s | × transformers |",
             "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        base = rows["transformers bf16" if row["dtype"] == "bfloat16" else "transformers fp32"]
        cells = [name]
        for key in ("decode", "prefill"):
            low, high = min(row[f"{key}_samples"]), max(row[f"{key}_samples"])
            cells.append(f"{row[key]:.0f} ({low:.0f}–{high:.0f})")
            ratios = np.divide(row[f"{key}_samples"], base[f"{key}_samples"])
            cells.append("1" if row is base else f"{np.median(ratios):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    machine, arguments = result["machine"], result["arguments"]
    versions = machine["versions"]
    lines += ["", f"{machine['cores']} cores of {machine['cpu']}, "
              f"{result['limits']['read_bytes_per_s'] / 1e9:.0f} GB/s; torch {versions['torch']}, "
              f"transformers {versions['transformers']}; {arguments['rounds']} interleaved rounds, "
              f"median (lowest–highest); {arguments['decode_prompt_tokens']}-token prompt, "
              f"{arguments['decode_tokens']} new tokens; {machine['date']}."]
    return "\n".join(lines)

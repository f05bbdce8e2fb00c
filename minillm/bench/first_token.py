"""Where does the time go between a prompt and its answer?

Both twins answer the same question, greedily and in float32, so that they do the same arithmetic
and write the same tokens; every token's time is kept. Then prompts of growing length, a short
answer to each. All of it in turns, torch NumPy torch NumPy …. Chapter 01_first_token.
"""

from __future__ import annotations

import time

import numpy as np
from tqdm import tqdm

from ..loading.registry import fetch
from . import draw, is_fast
from .peers import MODEL, in_process, measure_limits, read_prompt

QUESTION = "Here is the beginning of a play. What happens in it?"
PASSAGE_CHARACTERS = 700  # of the play, behind the question
TWINS = {"torch": draw.BLUE, "numpy": draw.ORANGE}
LABELS = {"torch": "torch", "numpy": "NumPy"}
PAUSE_S = 0.2  # threads of one library wait busily for work a while before they sleep


def measure():
    """The result, as JSON wants it."""
    from .. import LLM

    rounds = 2 if is_fast() else 5
    answer_tokens = 8 if is_fast() else 64
    lengths = [8, 16, 32] if is_fast() else [32, 64, 128, 256, 512]
    tokens_each = 3 if is_fast() else 12
    num_characters = 80 if is_fast() else PASSAGE_CHARACTERS
    text = fetch("macbeth").read_text(encoding="utf-8")[:num_characters]
    text_token_ids = read_prompt()

    limits = in_process(measure_limits)
    llms = {name: LLM(MODEL, backend=name, dtype="float32", batching="none") for name in TWINS}
    question = llms["numpy"].encode_chat([{"role": "user", "content": f"{QUESTION}\n\n{text}"}])
    prompts = {"answer": question} | {str(length): text_token_ids[:length] for length in lengths}
    for llm in llms.values():  # warm-up: allocators, thread pools, first-call set-up
        run(llm, prompts[str(lengths[-1])], 2)
    samples, answers = [], {}
    turns = [(number, prompt, name) for number in range(rounds) for prompt in prompts
             for name in llms]
    for number, prompt, name in tqdm(turns, desc="first_token", unit="answer"):
        time.sleep(PAUSE_S)
        output = run(llms[name], prompts[prompt],
                     answer_tokens if prompt == "answer" else tokens_each)
        if prompt == "answer":
            answers[name] = {"text": output.text, "token_ids": output.token_ids}
        samples.append({"twin": name, "prompt": prompt, "round": number,
                        "num_prompt_tokens": output.metrics.num_prompt_tokens,
                        "ttft_ms": output.metrics.ttft_ms, "itl_ms": output.metrics.itl_ms,
                        "tpot_ms": output.metrics.tpot_ms, "e2e_ms": output.metrics.e2e_ms})
    return {
        "arguments": {"model": MODEL, "dtype": "float32", "rounds": rounds,
                      "question_tokens": len(question), "answer_tokens": answer_tokens,
                      "lengths": lengths, "tokens_each": tokens_each},
        "devices": {name: llm.runner.device for name, llm in llms.items()},
        "limits": limits,
        "answers": answers,
        "samples": samples,
    }


def run(llm, prompt_token_ids, num_tokens):
    from .. import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return llm.generate([prompt_token_ids], params)[0]


def ttft_limit_ms(result, num_prompt_tokens):
    """The CPU's: two operations a weight and token, or one read of all weights if that is more."""
    limits = result["limits"]
    layers, head = limits["layer_params"], limits["head_params"]
    arithmetic_s = 2 * (layers * num_prompt_tokens + head) / limits["flops_per_s"]["float32"]
    return max(1000 * arithmetic_s, tpot_limit_ms(result))


def tpot_limit_ms(result):
    """The CPU's: a token reads every weight once, four bytes each."""
    limits = result["limits"]
    weight_bytes = 4 * (limits["layer_params"] + limits["head_params"])
    return 1000 * weight_bytes / limits["read_bytes_per_s"]


def samples_of(result, twin, prompt):
    return [sample for sample in result["samples"]
            if (sample["twin"], sample["prompt"]) == (twin, str(prompt))]


def medians(result, twin, key):
    """The median over the rounds of `key`, one for each prompt length."""
    return [float(np.median([sample[key] for sample in samples_of(result, twin, length)]))
            for length in result["arguments"]["lengths"]]


def figure(result):
    """Above: every token of one answer. Below: TTFT and TPOT against prompt length."""
    picture, axes = draw.new_figure(2, 2, height=5.6)
    for axis, twin in zip(axes[0], TWINS):
        draw_answer(axis, result, twin)
    axes[0, 1].sharey(axes[0, 0])
    for axis, key, title in zip(axes[1], ("ttft_ms", "tpot_ms"), (
            "TTFT: the prompt's part", "TPOT: each token after the first")):
        draw_lengths(axis, result, key)
        axis.set_title(title)
    axes[1, 1].sharey(axes[1, 0])
    axes[1, 1].legend(loc="upper left", frameon=False)
    return picture


def draw_answer(axis, result, twin):
    """Milliseconds before each token: dots for the rounds, a line through their medians."""
    arguments, colour = result["arguments"], TWINS[twin]
    samples = samples_of(result, twin, "answer")
    waits_ms = np.array([[sample["ttft_ms"], *sample["itl_ms"]] for sample in samples])
    ttft_ms = np.median(waits_ms[:, 0])
    tpot_ms = np.median([sample["tpot_ms"] for sample in samples])
    num_tokens = waits_ms.shape[1]
    index, left, right = np.arange(1, num_tokens + 1), 1 - num_tokens / 30, num_tokens + 1
    axis.axvspan(left, 1.5, color=draw.GREY, alpha=0.15, linewidth=0)
    axis.plot(index, waits_ms.T, ".", color=colour, markersize=2, alpha=0.35)
    axis.plot(index, np.median(waits_ms, axis=0), color=colour, linewidth=1)
    axis.plot(1, ttft_ms, "D", color=colour, markersize=6)
    axis.annotate(f"TTFT {ttft_ms:.0f} ms: prefill of {arguments['question_tokens']} tokens (grey)",
                  (1, ttft_ms), xytext=(10, 0), textcoords="offset points", va="center")
    axis.axhline(tpot_ms, color=draw.GREY, linestyle="--", linewidth=1)
    axis.annotate(f"TPOT {tpot_ms:.1f} ms: a decode step (dashed)", (right, tpot_ms), ha="right",
                  va="bottom", xytext=(0, 14), textcoords="offset points")
    for ends, limit_ms in (((1.5, right), tpot_limit_ms(result)),
                           ((left, 1.5), ttft_limit_ms(result, arguments["question_tokens"]))):
        axis.plot(ends, [limit_ms] * 2, color=draw.GREEN, linewidth=1.5)
    use_log_ms(axis)
    axis.set_xlim(left, right)
    axis.set_xticks([1, *range(num_tokens // 4, right, num_tokens // 4)])
    axis.set_xlabel("token of the answer")
    axis.set_ylabel("ms since the token before\n(the first: since submission)")
    axis.set_title(f"{LABELS[twin]}: one answer, token by token")


def use_log_ms(axis):
    """A logarithmic scale that says 50, 100, 200, and not only 10²."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def draw_lengths(axis, result, key):
    lengths = result["arguments"]["lengths"]
    for twin, colour in TWINS.items():
        for length in lengths:
            values = [sample[key] for sample in samples_of(result, twin, length)]
            axis.plot([length] * len(values), values, ".", color=colour, markersize=3, alpha=0.5)
        device = result["devices"][twin]
        axis.plot(lengths, medians(result, twin, key), color=colour, linewidth=1.5,
                  label=LABELS[twin] if device == "cpu" else f"{LABELS[twin]} on {device}")
    limit = ([ttft_limit_ms(result, length) for length in lengths] if key == "ttft_ms"
             else [tpot_limit_ms(result)] * len(lengths))
    axis.plot(lengths, limit, color=draw.GREEN, linewidth=1.5, label="limit of the CPU")
    axis.set_xscale("log", base=2)
    use_log_ms(axis)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("prompt length (tokens)")
    axis.set_ylabel("ms (median; dots: rounds)")


def table(result):
    """Two in Markdown: the one answer, then the prompt lengths with their growth."""
    arguments, machine = result["arguments"], result["machine"]
    lines = ["| one answer | TTFT, ms | TPOT, ms | ITL p50 / p95 / p99, ms | E2E, ms "
             "| prefill's share of E2E | output tokens/s |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for twin, label in LABELS.items():
        samples = samples_of(result, twin, "answer")
        gaps_ms = [gap for sample in samples for gap in sample["itl_ms"]]
        percentiles = " / ".join(f"{value:.1f}" for value in np.percentile(gaps_ms, (50, 95, 99)))
        shares = [sample["ttft_ms"] / sample["e2e_ms"] for sample in samples]
        speeds = [1000 * arguments["answer_tokens"] / sample["e2e_ms"] for sample in samples]
        lines.append(f"| {label} | {spread(samples, 'ttft_ms', 0)} | {spread(samples, 'tpot_ms')} "
                     f"| {percentiles} | {spread(samples, 'e2e_ms', 0)} "
                     f"| {100 * np.median(shares):.0f} % | {np.median(speeds):.1f} |")
    lines += ["", "| prompt tokens | TTFT torch, ms | TTFT NumPy, ms | limit, ms "
              "| TPOT torch, ms | TPOT NumPy, ms | limit, ms |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for length in arguments["lengths"]:
        ttft, tpot = ([spread(samples_of(result, twin, length), key, digits) for twin in TWINS]
                      for key, digits in (("ttft_ms", 0), ("tpot_ms", 1)))
        lines.append(f"| {length} | {' | '.join(ttft)} | {ttft_limit_ms(result, length):.0f} "
                     f"| {' | '.join(tpot)} | {tpot_limit_ms(result):.1f} |")
    growth = [f"× {medians(result, twin, key)[-1] / medians(result, twin, key)[0]:.1f}"
              for key in ("ttft_ms", "tpot_ms") for twin in TWINS]
    times = arguments["lengths"][-1] / arguments["lengths"][0]
    lines.append(f"| last row ÷ first: × {times:.0f} | {growth[0]} | {growth[1]} | "
                 f"| {growth[2]} | {growth[3]} | |")
    devices = ", ".join(f"{LABELS[twin]} on {device}" for twin, device in result["devices"].items()
                        if device != "cpu")
    lines += ["", f"{machine['cores']} cores of {machine['cpu']}, "
              f"{result['limits']['read_bytes_per_s'] / 1e9:.0f} GB/s, "
              f"{result['limits']['flops_per_s']['float32'] / 1e9:.0f} GFLOP/s"
              f"{'; ' + devices if devices else ''}; float32; "
              f"{arguments['rounds']} interleaved rounds, median (lowest–highest); one answer: "
              f"{arguments['question_tokens']} prompt tokens, {arguments['answer_tokens']} output "
              f"tokens, percentiles over all rounds; prompt lengths: {arguments['tokens_each']} "
              f"output tokens each; {machine['date']}."]
    return "\n".join(lines)


def spread(samples, key, digits=1):
    values = [sample[key] for sample in samples]
    return (f"{np.median(values):.{digits}f} "
            f"({min(values):.{digits}f}–{max(values):.{digits}f})")

"""How is the next word chosen: how sure is the model, what do the truncations let through, and what
does the choice cost?

Three measurements. Over many positions of a play, at each temperature: the entropy of the model's
next-token distribution, and how many tokens top_p, min_p and top_k leave. Of whole answers: how
much of them repeats. And the time of one call of the sampler against V, in both twins and in turns
with decode steps of the real model. Logits for another V are drawn from those of a real position,
so that their distribution is a model's. Chapter folder: chapters/06_sampling.
"""

from __future__ import annotations

import time

import numpy as np
from tqdm import tqdm

from ..loading.registry import fetch
from ..sampling import min_p_np, sample_np, sample_torch, softmax_np, top_k_np, top_p_np
from ..sampling_params import SamplingParams
from . import draw, is_fast

MODEL, TEXT, DTYPE = "smollm2-135m-instruct", "macbeth", "float32"
NUM_CONTEXT, FIRST_POSITION = 512, 128  # tokens of the play; the first that is looked at
PROMPTS = ("I think that", "My favourite thing about the sea is")

TRUNCATIONS = {"top_p=0.9": lambda x: top_p_np(x, 0.9), "min_p=0.1": lambda x: min_p_np(x, 0.1),
               "top_k=50": lambda x: top_k_np(x, 50)}
WAYS = {  # how a token is chosen, from the cheapest on
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "min_p": SamplingParams(temperature=0.8, min_p=0.1),
    "top_k": SamplingParams(temperature=0.8, top_k=50),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
}
ANSWERS = {
    "greedy": {"temperature": 0},
    "greedy, repetition_penalty 1.2": {"temperature": 0, "repetition_penalty": 1.2},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9, "seed": 0},
    "temperature 1": {"temperature": 1, "seed": 0},
}
NUM_GRAM = 4  # so many tokens in a row count as repeated if they stood there before


def measure():
    """The result, as JSON wants it."""
    from .. import LLM

    # float32 in both twins: in bfloat16 many logits would be equal, and top_k would keep them all.
    models = {"torch": LLM(MODEL, backend="torch", dtype=DTYPE),
              "NumPy": LLM(MODEL, backend="numpy", dtype=DTYPE)}
    llm = models["torch"]
    text = fetch(TEXT).read_text(encoding="utf-8")
    num_context = 160 if is_fast() else NUM_CONTEXT
    token_ids = llm.tokenizer.encode(text[: 8 * num_context])[:num_context]
    logits = llm.logits(token_ids)[FIRST_POSITION:]  # [T, V]
    temperatures = [0.5, 1, 1.5] if is_fast() else [
        0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2]
    positions = measure_positions(logits[:: 8 if is_fast() else 4], temperatures)
    middle = int(np.argsort([softmax_entropy(row) for row in logits])[len(logits) // 2])
    return {
        "arguments": {"model": MODEL, "text": TEXT, "dtype": DTYPE, "device": llm.runner.device,
                      "num_context": num_context, "first_position": FIRST_POSITION,
                      "temperatures": temperatures, "prompts": PROMPTS, "ways": list(WAYS)},
        "vocab_size": logits.shape[1],
        "positions": positions,
        "answers": measure_answers(llm),
        "times": measure_times(models, logits[middle], token_ids),
    }


def measure_positions(logits, temperatures):
    """One entry a temperature, with a list over all positions of everything that is measured."""
    entries = []
    for temperature in tqdm(temperatures, desc="sampling: temperatures"):
        scaled = [row.astype(np.float64) / temperature for row in logits]
        entry = {"temperature": temperature,
                 "entropy_bits": [round(softmax_entropy(row), 4) for row in scaled]}
        for name, truncate in TRUNCATIONS.items():
            entry[name] = [int(np.isfinite(truncate(row)).sum()) for row in scaled]
        entries.append(entry)
    return entries


def softmax_entropy(logits):
    """-Σ p·log2(p): how many yes-no questions it takes to learn the token, on average."""
    probs = softmax_np(logits)
    probs = probs[probs > 0]
    return float(-(probs * np.log2(probs)).sum())


def measure_answers(llm):
    """What each way of choosing writes, and which share of it had been written before."""
    answers, num_tokens = [], 12 if is_fast() else 160
    for prompt in tqdm(PROMPTS, desc="sampling: answers"):
        for name, fields in ANSWERS.items():
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **fields)
            output = llm.generate([prompt], params)[0]
            answers.append({"way": name, "prompt": prompt, "token_ids": output.token_ids,
                            "text": output.text, "repeated": repeated(output.token_ids)})
    return answers


def repeated(token_ids):
    """The share of runs of NUM_GRAM tokens that occurred earlier in the same text."""
    runs = [tuple(token_ids[i : i + NUM_GRAM]) for i in range(len(token_ids) - NUM_GRAM + 1)]
    return 1 - len(set(runs)) / len(runs)


def measure_times(models, row, prompt_token_ids):
    """Seconds a call of the sampler, and of a decode step, all in turns."""
    import torch

    rounds, sizes = (2, (1024, 49152)) if is_fast() else (15, (1024, 4096, 16384, 49152, 262144))
    rng = np.random.default_rng(0)
    device = models["torch"].runner.device
    cases = []
    for V in sizes:
        # What is drawn twice differs a little, or the equals of the k-th best would all stay.
        drawn = rng.choice(row, V) + rng.normal(0, 1e-3, V)
        logits = (row if V == len(row) else drawn).astype(np.float32)
        cases += [(V, way, "NumPy", sample_np, logits) for way in WAYS]
        cases += [(V, way, "torch", sample_torch, torch.from_numpy(logits).to(device))
                  for way in WAYS]
    sampler = [{"V": V, "way": way, "twin": twin, "seconds": []} for V, way, twin, *_ in cases]
    steps = {twin: [] for twin in models}
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for number in tqdm(range(rounds + 1), desc="sampling: rounds"):  # the first is the warm-up
        for entry, (V, way, _, sample, logits) in zip(sampler, cases):
            num_calls = max(1, 2**16 // V)
            us = rng.random(num_calls)
            start_s = time.perf_counter()
            for u in us:
                sample(logits, WAYS[way], u)
            if number:
                entry["seconds"].append((time.perf_counter() - start_s) / num_calls)
        for twin, llm in models.items():
            output = llm.generate([prompt_token_ids[:64]], params)[0]
            if number:
                steps[twin] += [gap / 1000 for gap in output.metrics.itl_ms]
    return {"rounds": rounds, "sampler": sampler, "decode_step_seconds": steps}


COLOURS = {"greedy": draw.GREY, "temperature": draw.SKY, "min_p": draw.GREEN,
           "top_k": draw.ORANGE, "top_p": draw.BLUE}


def figure(result):
    """Above: the distribution against temperature. Below: the sampler's time against V."""
    picture, axes = draw.new_figure(2, 2, height=6.0)
    draw_entropy(axes[0, 0], result)
    draw_counts(axes[0, 1], result)
    for axis, twin in zip(axes[1], ("NumPy", "torch")):
        draw_times(axis, result, twin)
    low = min(axis.get_ylim()[0] for axis in axes[1])
    high = max(axis.get_ylim()[1] for axis in axes[1])
    for axis in axes[1]:
        axis.set_ylim(low, high)
    return picture


def draw_entropy(axis, result):
    temperatures = [entry["temperature"] for entry in result["positions"]]
    draw_quartiles(axis, temperatures, [entry["entropy_bits"] for entry in result["positions"]],
                   draw.BLUE, "the model")
    most = np.log2(result["vocab_size"])
    axis.axhline(most, color=draw.GREEN, linewidth=2)
    axis.text(temperatures[0], most - 0.25, f"limit: log₂ V = {most:.1f} bits, all tokens alike",
              color=draw.GREEN, va="top")
    axis.set_ylim(0, most + 0.8)
    axis.set(xlabel="temperature", ylabel="entropy of the next token (bits)",
             title=f"how unsure the model is ({result['arguments']['text']})")
    axis.text(0.97, 0.05, "line: median position\nband: middle half", color=draw.GREY,
              transform=axis.transAxes, ha="right")


def draw_counts(axis, result):
    temperatures = [entry["temperature"] for entry in result["positions"]]
    for name, colour in zip(TRUNCATIONS, (draw.BLUE, draw.GREEN, draw.ORANGE)):
        draw_quartiles(axis, temperatures, [entry[name] for entry in result["positions"]], colour,
                       name)
    axis.axhline(result["vocab_size"], color=draw.GREY, linestyle=":", linewidth=1)
    axis.text(temperatures[0], result["vocab_size"] * 0.8, "all V tokens", color=draw.GREY,
              va="top")
    axis.set_yscale("log")
    axis.set(xlabel="temperature", ylabel="tokens let through", ylim=(0.8, 1e5),
             title="what the truncations leave")
    axis.legend(loc="center left", bbox_to_anchor=(0, 0.7), frameon=False)


def draw_quartiles(axis, x, samples, colour, label):
    low, middle, high = np.percentile(np.array(samples), [25, 50, 75], axis=1)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, middle, color=colour, label=label)


def draw_times(axis, result, twin):
    for way, colour in COLOURS.items():
        entries = [entry for entry in result["times"]["sampler"]
                   if (entry["way"], entry["twin"]) == (way, twin)]
        sizes = [entry["V"] for entry in entries]
        for entry in entries:
            axis.plot([entry["V"]] * len(entry["seconds"]), np.multiply(entry["seconds"], 1e3), ".",
                      color=colour, markersize=2, alpha=0.5)
        axis.plot(sizes, [1e3 * np.median(entry["seconds"]) for entry in entries], color=colour,
                  marker="o", markersize=3, label=way)
    step_ms = 1e3 * np.median(result["times"]["decode_step_seconds"][twin])
    axis.axhline(step_ms, color="black", linewidth=1.5, linestyle="--")
    axis.text(min(sizes), step_ms * 0.85, "one decode step of the model", va="top")
    axis.axvline(result["vocab_size"], color=draw.GREY, linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size // 1024}k" for size in sizes])
    device = "cpu" if twin == "NumPy" else result["arguments"]["device"]
    axis.set(xlabel="vocabulary V (dotted: this model's)", ylabel="one token chosen (ms)",
             title=f"the sampler's time, {twin} on {device}")
    if twin == "NumPy":
        axis.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 0.86))


def table(result):
    """Three tables: tokens let through, repetition, and the sampler's share of a decode step."""
    lines = ["| temperature | entropy, bits | top_p=0.9: tokens left | min_p=0.1 | top_k=50 |",
             "| --- | --- | --- | --- | --- |"]
    for entry in result["positions"]:
        if entry["temperature"] in (0.3, 0.5, 0.7, 1, 1.5, 2):
            cells = [quartiles(entry["entropy_bits"], ".1f"),
                     *(quartiles(entry[name], ".0f") for name in TRUNCATIONS)]
            lines.append(f"| {entry['temperature']:g} | {' | '.join(cells)} |")
    lines += ["", "| way of choosing | repeated, % | how its first answer ends |",
              "| --- | --- | --- |"]
    for way in ANSWERS:
        answers = [answer for answer in result["answers"] if answer["way"] == way]
        shares = ", ".join(f"{100 * answer['repeated']:.0f}" for answer in answers)
        lines.append(f"| {way} | {shares} | {ending(answers[0]['text'])} |")
    V, times = result["vocab_size"], result["times"]
    lines += ["", f"| sampler, V = {V} | NumPy, ms | % of a step | torch, ms | % of a step |",
              "| --- | --- | --- | --- | --- |"]
    medians = {(entry["way"], entry["twin"]): 1e3 * np.median(entry["seconds"])
               for entry in times["sampler"] if entry["V"] == V}
    steps = {twin: 1e3 * np.median(gaps) for twin, gaps in times["decode_step_seconds"].items()}
    for way in WAYS:
        cells = [f"{medians[way, twin]:.2f} | {100 * medians[way, twin] / steps[twin]:.1f}"
                 for twin in ("NumPy", "torch")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines.append(f"| one decode step | {steps['NumPy']:.1f} | 100 | {steps['torch']:.1f} | 100 |")
    machine, arguments = result["machine"], result["arguments"]
    lines += ["", f"Median (middle half) over {len(result['positions'][0]['entropy_bits'])} "
              f"positions of {arguments['text']}. Repeated: the share of runs of {NUM_GRAM} tokens "
              "that stood in the answer before, one number for each of "
              f"{len(arguments['prompts'])} answers of {len(result['answers'][0]['token_ids'])} "
              f"tokens. Times: median of {times['rounds']} interleaved rounds, "
              f"{arguments['dtype']} logits; {machine['cores']} cores of {machine['cpu']}, torch "
              f"on {machine['gpu'] or 'the same'}, "
              f"torch {machine['versions']['torch']}; {machine['date']}."]
    return "\n".join(lines)


def quartiles(samples, form):
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def ending(text, num_characters=90):
    """The end of a text, in one cell of a table."""
    words = " ".join(text.split())[-num_characters:]
    return f"… {words.partition(' ')[2].replace('|', '/')}"

"""Why not recompute? What does one more token cost, with no cache, a growing one and a fixed one?

Three ways of coming by the keys and values of the tokens before, behind the same `attend`:

    recomputed      nothing is kept: the whole text goes through the model again for every token
    concatenated    kept in arrays that are as long as the text: each token makes new ones
    preallocated    kept in arrays of full length (minillm/kv_cache.py): each token fills a row

A position is reached by writing random keys and values into the cache, since time does not depend
on their values, and a prefill of thousands of tokens would be most of the run. Chapter folder:
chapters/07_kv_cache.
"""

from __future__ import annotations

import time

import lazy_loader as lazy
import numpy as np
from tqdm import tqdm

from ..kv_cache import KVCache, KVCacheTorch
from . import draw, is_fast
from .machine import flops, flops_numpy, read_bandwidth

torch = lazy.load("torch")

MODEL = "smollm2-135m-instruct"
BACKENDS = ("numpy", "torch")
CACHES = ("recomputed", "concatenated", "preallocated")
COLOURS = dict(zip(CACHES, (draw.RED, draw.ORANGE, draw.BLUE)))
POSITIONS = (16, 64, 256, 512, 1024, 2048, 4096, 8184)
MAX_RECOMPUTED = 512  # beyond, one token takes seconds
TIMED_STEPS = 3
PROMPT = "The reason why the sky is blue is that"
ANSWER_TOKENS = 64

# From each model's config.json: layers, query heads, key/value heads, head dimension.
LARGER_MODELS = {
    "Qwen3-0.6B": (28, 16, 8, 128),
    "Llama-2-7B": (32, 32, 32, 128),
    "Llama-3.1-8B": (32, 32, 8, 128),
    "Llama-3.1-70B": (80, 64, 8, 128),
}
BYTES_A_NUMBER = 2  # in the memory table: bfloat16 or float16, what these models are served in


class ConcatenatedCache(KVCache):
    """Keys and values in arrays that are exactly long enough, and so never for long (NumPy)."""

    def __init__(self, config, dtype):
        empty = np.empty((config.num_key_value_heads, 0, config.head_dim), dtype)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    @property
    def length(self):
        return self.keys[-1].shape[1]

    def append(self, layer, k, v):
        self.keys[layer] = np.concatenate([self.keys[layer], k.swapaxes(0, 1)], axis=1)
        self.values[layer] = np.concatenate([self.values[layer], v.swapaxes(0, 1)], axis=1)
        return self.keys[layer], self.values[layer]


class ConcatenatedCacheTorch(KVCacheTorch):
    """The same in PyTorch; transformers' DynamicCache grows like this."""

    def __init__(self, config, dtype, device):
        shape = (config.num_key_value_heads, 0, config.head_dim)
        empty = torch.empty(shape, dtype=dtype, device=device)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    @property
    def length(self):
        return self.keys[-1].shape[1]

    def append(self, layer, k, v):
        self.keys[layer] = torch.cat([self.keys[layer], k.swapaxes(0, 1)], dim=1)
        self.values[layer] = torch.cat([self.values[layer], v.swapaxes(0, 1)], dim=1)
        return self.keys[layer], self.values[layer]


def measure():
    """The result, as JSON wants it."""
    from .. import LLM

    rounds = 2 if is_fast() else 5
    positions = (8, 16) if is_fast() else POSITIONS
    answer_tokens = 4 if is_fast() else ANSWER_TOKENS
    llms = {name: LLM(MODEL, backend=name, dtype="float32") for name in BACKENDS}
    config, runners = llms["numpy"].config, {name: llm.runner for name, llm in llms.items()}
    limits = measure_limits(config, size=256 if is_fast() else 2048)

    prompt_token_ids = llms["torch"].encode_prompt(PROMPT)
    answers = {name: answer(runners["torch"], name, prompt_token_ids, answer_tokens)
               for name in ("recomputed", "preallocated")}
    samples = []
    for number in tqdm(range(rounds), desc="kv_cache", unit="round"):
        for backend, runner in runners.items():  # not in turns of a token: their threads would mix
            turn(runner, "preallocated", positions[0])  # wakes them up
            for position in positions:
                for name in CACHES:
                    if name == "recomputed" and position > MAX_RECOMPUTED:
                        continue
                    step_s, rows = turn(runner, name, position)
                    samples.append({"backend": backend, "cache": name, "position": position,
                                    "round": number, "step_s": step_s, "rows": rows})
    (H, K, D), L = config.heads, config.num_hidden_layers
    return {
        "arguments": {"model": MODEL, "dtype": "float32", "rounds": rounds,
                      "prompt_tokens": len(prompt_token_ids), "answer_tokens": answer_tokens},
        "devices": {name: runner.device for name, runner in runners.items()},
        "limits": limits,
        "models": {"SmolLM2-135M": (L, H, K, D), **LARGER_MODELS},
        "answers": answers,
        "samples": samples,
    }


def turn(runner, name, position):
    """Seconds of the token at `position` and those after it, and the rows that one of them took."""
    untimed, timed = (0, 1) if name == "recomputed" else (1, TIMED_STEPS)
    token_ids = [token % 1000 for token in range(position)]
    cache = new_cache(runner, name, position + untimed + timed)
    if name != "recomputed":
        fill(cache, runner, position)
    step_s = []
    for _ in range(untimed + timed):
        token_ids.append(len(token_ids) % 1000)
        start_s = time.perf_counter()
        _, rows = step(runner, cache, token_ids)
        step_s.append(time.perf_counter() - start_s)
    return step_s[untimed:], rows


def new_cache(runner, name, capacity):
    config = runner.weights.config
    if name != "concatenated":
        return runner.new_cache(capacity)
    if runner.backend == "numpy":
        return ConcatenatedCache(config, runner.dtype)
    return ConcatenatedCacheTorch(config, runner.torch_dtype, runner.torch_device)


def fill(cache, runner, num_tokens):
    """Random keys and values of so many tokens, the same in every layer."""
    config = runner.weights.config
    shape = (num_tokens, config.num_key_value_heads, config.head_dim)
    numbers = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if runner.backend == "torch":
        numbers = torch.from_numpy(numbers).to(runner.torch_device, runner.torch_dtype)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, numbers, numbers)


def step(runner, cache, token_ids):
    """Take the tokens that the cache lacks through the model; -> logits [V], how many those were.

    Logits are copied to NumPy, which on a GPU waits until they are there.
    """
    positions = list(range(cache.length, len(token_ids)))
    logits = runner.forward(token_ids[cache.length:], positions, cache, rows=[-1])
    return runner.to_numpy(logits)[0], len(positions)


def answer(runner, name, prompt_token_ids, num_tokens):
    """A greedy answer, and the rows that had gone through the model when each token came."""
    cache = runner.new_cache(len(prompt_token_ids) + num_tokens)
    token_ids, total_rows = list(prompt_token_ids), [0]
    for _ in range(num_tokens):
        if name == "recomputed":
            cache.truncate(0)
        logits, rows = step(runner, cache, token_ids)
        token_ids.append(int(logits.argmax()))
        total_rows.append(total_rows[-1] + rows)
    return {"token_ids": token_ids[len(prompt_token_ids):], "total_rows": total_rows[1:]}


def measure_limits(config, size):
    """What this machine's CPU can do, and what a token of this model needs of it in float32."""
    (H, K, D), C, L = config.heads, config.hidden_size, config.num_hidden_layers
    layer_params = C * (H + 2 * K) * D + H * D * C + 3 * C * config.intermediate_size
    return {
        "read_bytes_per_s": read_bandwidth(size * size * 256),
        "flops_per_s": max(flops("float32", size), flops_numpy(size)),
        "layer_params": L * layer_params,  # norms are left out: a ten-thousandth
        "head_params": config.vocab_size * C,
        "cache_bytes_a_token": 2 * L * K * D * 4,
    }


def limit_ms(limits, position, rows):
    """The least that a CPU needs: each weight and each cached number once from memory, and two
    operations a weight and row (the head's for one row)."""
    read_bytes = 4 * (limits["layer_params"] + limits["head_params"])
    if rows == 1:
        read_bytes += limits["cache_bytes_a_token"] * position
    operations = 2 * (limits["layer_params"] * rows + limits["head_params"])
    return 1000 * max(read_bytes / limits["read_bytes_per_s"], operations / limits["flops_per_s"])


def medians(result):
    """{(backend, cache): {position: [a round's median, in ms, …]}}."""
    rounds = {}
    for sample in result["samples"]:
        by_position = rounds.setdefault((sample["backend"], sample["cache"]), {})
        by_position.setdefault(sample["position"], []).append(1000 * np.median(sample["step_s"]))
    return rounds


def figure(result):
    """TPOT against position in both twins; rows computed; memory a token."""
    picture, axes = draw.new_figure(2, 2, height=5.6)
    times, limits = medians(result), result["limits"]
    for axis, backend in zip(axes[0], BACKENDS):
        for name in CACHES:
            by_position = times[backend, name]
            axis.plot(list(by_position), [np.median(ms) for ms in by_position.values()], "-",
                      color=COLOURS[name], label=name)
            for position, ms in by_position.items():
                axis.plot([position] * len(ms), ms, ".", color=COLOURS[name], markersize=3)
        if result["devices"][backend] == "cpu":
            for name, label in (("preallocated", "limits of this machine"), ("recomputed", None)):
                positions = list(times[backend, name])
                rows = [each + 1 if name == "recomputed" else 1 for each in positions]
                axis.plot(positions, [limit_ms(limits, *pair) for pair in zip(positions, rows)],
                          "--", color=draw.GREEN, linewidth=1.2, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(list(times[backend, "preallocated"]), minor=False)
        axis.minorticks_off()
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter("{x:g}")
        axis.set_xlabel("position: tokens before this one")
        title = {"numpy": "NumPy", "torch": "torch"}[backend]
        axis.set_title(f"{title} {result['devices'][backend]}, {result['arguments']['dtype']}")
        axis.grid(axis="y", color="#eeeeee")
    low = min(axis.get_ylim()[0] for axis in axes[0])
    high = max(axis.get_ylim()[1] for axis in axes[0])
    for axis in axes[0]:
        axis.set_ylim(low, high)
        axis.set_yticks([ms for ms in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
                         if low <= ms <= high])
    axes[0, 0].set_ylabel("TPOT, ms a token (dots: rounds)")
    picture.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=4,
                   loc="outside upper center")
    draw_rows(axes[1, 0], result)
    draw_memory(axes[1, 1], result["models"])
    return picture


def draw_rows(axis, result):
    for name, label in (("recomputed", "without a cache"), ("preallocated", "with a cache")):
        rows = result["answers"][name]["total_rows"]
        axis.plot(range(1, len(rows) + 1), rows, color=COLOURS[name], label=label)
    axis.set_xlabel(f"tokens of an answer (to a prompt of {result['arguments']['prompt_tokens']})")
    axis.set_ylabel("rows computed so far")
    axis.set_title("rows through the model, counted")
    axis.legend(frameon=False)


def draw_memory(axis, models):
    for y, (L, H, K, D) in enumerate(models.values()):
        own, shared = (2 * L * heads * D * BYTES_A_NUMBER / 1024 for heads in (H, K))
        axis.plot([shared, own], [y, y], "-", color=draw.GREY, linewidth=1)
        axis.plot(own, y, "o", color="white", markeredgecolor=draw.GREY)
        axis.plot(shared, y, "o", color=draw.BLUE)
        axis.text(own, y, f"   {shared:.0f} ({own:.0f})" if H != K else f"   {shared:.0f}",
                  va="center", fontsize=8)
    axis.set_yticks(range(len(models)), list(models))
    axis.set_xscale("log")
    axis.set_xlim(left=10, right=axis.get_xlim()[1] * 8)  # room for the labels
    axis.set_ylim(len(models) - 0.5, -0.5)
    axis.grid(axis="x", color="#eeeeee")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("cache, KiB a token at 2 bytes a number\n"
                    "(white, in brackets: if query heads shared none)")
    axis.set_title("memory of a token: 2·L·K·D numbers")


def table(result):
    """Markdown: a row a position, then a row a model."""
    times = medians(result)
    heads = [f"{backend}: {name}" for backend in ("NumPy", "torch") for name in CACHES]
    lines = [f"| position | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for position in times["numpy", "preallocated"]:
        cells = [cell(times, backend, name, position) for backend in BACKENDS for name in CACHES]
        lines.append(f"| {position} | {' | '.join(cells)} |")
    machine, arguments, answers = result["machine"], result["arguments"], result["answers"]
    total = {name: each["total_rows"][-1] for name, each in answers.items()}
    same = answers["recomputed"]["token_ids"] == answers["preallocated"]["token_ids"]
    device = machine["gpu"] if result["devices"]["torch"] != "cpu" else "the CPU"
    lines += [
        "", "ms a token, and × the preallocated cache: medians over the rounds, ratios taken "
        "within a round.", "",
        f"An answer of {arguments['answer_tokens']} tokens to a prompt of "
        f"{arguments['prompt_tokens']} took {total['recomputed']} rows without a cache and "
        f"{total['preallocated']} with it; the tokens are {'the same' if same else 'not the same'}."
        "", "", "| | L | H | K | D | cache, KiB a token | if K were H | 8192 tokens, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, (L, H, K, D) in result["models"].items():
        own, shared = (2 * L * heads * D * BYTES_A_NUMBER for heads in (H, K))
        lines.append(f"| {name} | {L} | {H} | {K} | {D} | {shared / 1024:.1f} | {own / 1024:.1f} | "
                     f"{8192 * shared / 2**30:.2f} |")
    lines += [
        "", f"{machine['cores']} cores of {machine['cpu']}, "
        f"{result['limits']['read_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"{result['limits']['flops_per_s'] / 1e9:.0f} GFLOP/s; torch on {device}; "
        f"{arguments['model']} in {arguments['dtype']}; {arguments['rounds']} interleaved rounds; "
        f"torch {machine['versions']['torch']}, NumPy {machine['versions']['numpy']}; "
        f"{machine['date']}."]
    return "\n".join(lines)


def cell(times, backend, name, position):
    """"104 · ×4.2": the median, and how much that is of the preallocated cache's."""
    ms, base = (times[backend, each].get(position) for each in (name, "preallocated"))
    if ms is None:
        return "–"
    if name == "preallocated":
        return f"{np.median(ms):.0f} ({min(ms):.0f}–{max(ms):.0f})"
    return f"{np.median(ms):.0f} · ×{np.median(np.divide(ms, base)):.2f}"

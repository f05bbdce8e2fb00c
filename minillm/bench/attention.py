"""Why is prefill quadratic, and need its memory be?

Every form of attention in `attention.py`, at the head sizes of the default model, on prompts of
doubling length: seconds, and the most memory held at one moment beyond the inputs. Chapter folder:
chapters/04_attention.

How memory is counted: NumPy reports its arrays to tracemalloc; what PyTorch's allocator hands out
on a CPU is in the trace of its profiler, and on a GPU in its statistics. All three count bytes
asked for and not given back yet, so they agree where the arrays are the same; the resident memory
of the process, which also depends on what malloc keeps for later, would not.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import attention
from . import draw, is_fast
from .machine import flops, flops_numpy, seconds

H, K, D = 9, 3, 64  # SmolLM2-135M
ITEM_BYTES = 4  # float32
NAMES = {  # variant: its function
    "naive, NumPy": "attention_np",
    "naive, torch": "attention_torch",
    "online, NumPy": "online_softmax_attention_np",
    "online, torch": "online_softmax_attention_torch",
    "fused, torch": "attention_sdpa",
}
COLOURS = {"naive": draw.ORANGE, "online": draw.BLUE, "fused": draw.GREEN}


def measure():
    """The result, as JSON wants it."""
    from ..model_runner import choose_device

    device = choose_device("auto")
    lengths = [16, 32, 64] if is_fast() else [64, 128, 256, 512, 1024, 2048, 4096]
    runs = {length: {name: prepared(name, length, device) for name in NAMES} for length in lengths}
    # The memory pass is the warm-up too: allocators, thread pools, first-call set-up.
    memory = [{"variant": name, "length": length, "peak_bytes": peak_bytes(name, run, device)}
              for length in lengths
              for name, run in tqdm(runs[length].items(), desc=f"memory at {length}", leave=False)]
    turns = [(number, length, name) for number in range(max(map(num_rounds, lengths)))
             for length in lengths if number < num_rounds(length) for name in NAMES]
    samples = [{"variant": name, "length": length, "round": number,
                "times_s": [seconds(runs[length][name]) for _ in range(num_calls(length))]}
               for number, length, name in tqdm(turns, desc="attention", unit="turn")]
    return {
        "arguments": {"H": H, "K": K, "D": D, "dtype": "float32", "lengths": lengths,
                      "block_size": 256, "device": str(device),
                      "rounds": {length: num_rounds(length) for length in lengths}},
        "limits": {"flops_per_s": max(flops("float32"), flops_numpy())},
        "memory": memory,
        "samples": samples,
    }


def num_rounds(length):
    """A long one takes seconds, and differs less from call to call."""
    return 2 if is_fast() else 7 if length < 2048 else 3


def num_calls(length):
    """Calls a turn: the first of a short one meets caches and threads of the variant before it."""
    return max(1, 1024 // length)


def prepared(name, length, device):
    """A function without arguments, which ends when the result is there."""
    import torch

    rng = np.random.default_rng(length)
    arrays = [rng.standard_normal((heads, length, D), dtype=np.float32) for heads in (H, K, K)]
    function = getattr(attention, NAMES[name])
    if name.endswith("NumPy"):
        return lambda: function(*arrays)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]

    def run():
        function(*tensors)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def peak_bytes(name, run, device):
    """The most that one call held at a moment, beyond what was there before."""
    import torch

    if name.endswith("NumPy"):
        tracemalloc.start()
        run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with silence(), torch.profiler.profile(activities=cpu_only, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events
                     if event["name"] == "[memory]")  # freed bytes are negative
    return int(max(np.cumsum([num_bytes for _, num_bytes in changes])))


@contextlib.contextmanager
def silence():
    """The profiler announces itself on standard error, from C++, past sys.stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def figure(result):
    """Time and memory against length, each between a line of slope 1 and one of slope 2."""
    picture, (time_axes, memory_axes) = draw.new_figure(1, 2, height=3.9)
    lengths = np.array(result["arguments"]["lengths"])
    for name in NAMES:
        form, _, backend = name.partition(", ")
        style = {"color": COLOURS[form], "label": name, "markersize": 4, "linewidth": 1.3,
                 **({"marker": "s", "linestyle": "--", "markerfacecolor": "white"}
                    if backend == "NumPy" else {"marker": "o", "linestyle": "-"})}
        times_ms = [1e3 * np.array(times_of(result, name, length)) for length in lengths]
        medians = [np.median(times) for times in times_ms]
        time_axes.plot(lengths, medians, **style)
        time_axes.vlines(lengths, [min(times) for times in times_ms],
                         [max(times) for times in times_ms], color=COLOURS[form], linewidth=0.8)
        memory_axes.plot(lengths, [peak_of(result, name, length) / 2**20 for length in lengths],
                         **style)
    for axes, lower, upper, words in (
            (time_axes, None, 1e3 * limit_s(result, lengths),
             ("", "this CPU's limit: the visible pairs' FLOPs\n÷ measured FLOP/s (slope 2)")),
            (memory_axes, output_bytes(lengths) / 2**20, score_bytes(lengths) / 2**20,
             ("the output alone (slope 1)", "all scores, once (slope 2)"))):
        if lower is not None:
            axes.plot(lengths, lower, ":", color=draw.GREY, label=words[0])
        axes.plot(lengths, upper, "-.", color=draw.GREY, label=words[1])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, lengths)
        axes.set_xlabel("length of the prompt, tokens")
        axes.grid(alpha=0.2)
    # Nothing in time has slope 1; a guide that ends where the limit does shows what it would be.
    end_ms = 1e3 * limit_s(result, lengths[-1])
    time_axes.plot(lengths, end_ms * lengths / lengths[-1], ":", color=draw.GREY,
                   label="slope 1, for comparison")
    time_axes.set_ylabel("time, ms (median; bars: fastest to slowest)")
    memory_axes.set_ylabel("peak memory beyond the inputs, MiB")
    time_axes.set_title("one layer's attention: time")
    memory_axes.set_title("one layer's attention: memory")
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize=6.5, frameon=False, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    return picture


def times_of(result, name, length):
    """Seconds of every call."""
    return [time_s for sample in result["samples"]
            if sample["variant"] == name and sample["length"] == length
            for time_s in sample["times_s"]]


def peak_of(result, name, length):
    return next(entry["peak_bytes"] for entry in result["memory"]
                if entry["variant"] == name and entry["length"] == length)


def limit_s(result, length):
    """4·D FLOPs for each head and each pair of a query and a key that it may see, at full speed."""
    return 4 * H * D * length * (length + 1) / 2 / result["limits"]["flops_per_s"]


def output_bytes(length):
    return H * length * D * ITEM_BYTES


def score_bytes(length):
    return H * length * length * ITEM_BYTES


def table(result):
    """Markdown: the longest prompt, and what the last doubling of the length did."""
    *_, half, longest = result["arguments"]["lengths"]
    lines = [f"| | time at {longest}, ms | after a doubling | × the limit | "
             f"memory at {longest}, MiB | after a doubling |",
             "| --- | --- | --- | --- | --- | --- |"]
    for name in NAMES:
        times_ms = [1e3 * time_s for time_s in times_of(result, name, longest)]
        peak, peak_half = (peak_of(result, name, length) for length in (longest, half))
        lines.append(
            f"| {name} | {np.median(times_ms):.0f} ({min(times_ms):.0f}–{max(times_ms):.0f}) "
            f"| × {time_growth(result, name, half, longest):.1f} "
            f"| {np.median(times_ms) / 1e3 / limit_s(result, longest):.1f} "
            f"| {peak / 2**20:.0f} | × {peak / peak_half:.1f} |")
    limit_ms = 1e3 * limit_s(result, longest)
    limit_growth = limit_s(result, longest) / limit_s(result, half)
    lines.append(f"| limit | {limit_ms:.0f} | × {limit_growth:.1f} | 1 "
                 f"| {output_bytes(longest) / 2**20:.0f} | × 2.0 |")
    machine, arguments = result["machine"], result["arguments"]
    versions, gpu = machine["versions"], machine["gpu"]
    where = f"{machine['cores']} cores of {machine['cpu']}" + (
        f"; torch on {gpu}" if arguments["device"] != "cpu" else "")
    lines += ["", f"{where}, {result['limits']['flops_per_s'] / 1e9:.0f} GFLOP/s in float32; "
              f"torch {versions['torch']}, NumPy {versions['numpy']}; one layer, H={H}, K={K}, "
              f"D={D}, T=S; {arguments['rounds'][str(longest)]} interleaved rounds, median "
              f"(lowest–highest); a doubling is from {half} to {longest}; {machine['date']}."]
    return "\n".join(lines)


def time_growth(result, name, half, longest):
    """The median over the rounds of the ratio within a round."""
    by_round = {(sample["length"], sample["round"]): np.median(sample["times_s"])
                for sample in result["samples"] if sample["variant"] == name}
    return float(np.median([by_round[longest, number] / by_round[half, number]
                            for length, number in by_round if length == longest]))

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · The model
#
# Is this machine bound by compute or by memory?
#
# We open a real checkpoint down to its bytes, put the whole model together, count what one pass
# through it needs, and then find out which of the two this machine runs out of first. The
# chapter's text is `chapters/05_model/README.md`.

# %%
import dataclasses
import inspect
import os

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch.utils.flop_counter import FlopCounterMode

from minillm import LLM, SamplingParams, model
from minillm.bench import machine, roofline
from minillm.course import using
from minillm.linear import Dense
from minillm.loading import gguf, gguf_blocks, open_checkpoint
from minillm.loading.registry import resolve

fast = os.environ.get("MINILLM_FAST") == "1"  # shrinks everything; then nothing is measured
llm = LLM(backend="numpy")
weights, config = llm.runner.weights, llm.config
config

# %% [markdown]
# ## Where are the parameters?
#
# **Predict.** This model has 30 layers and a table of 49 152 tokens. Which part holds most of its
# numbers: the table, attention, or the feed-forward networks? And what share has the table?

# %%
parameters = roofline.count_parameters(config)
for part, count in parameters.items():
    print(f"{part:13} {count:12,}   {count / sum(parameters.values()):6.1%}")
print(f"{'all':13} {sum(parameters.values()):12,}")
print(f"the head is the embedding: {weights.lm_head is weights.embed_tokens}")

# %% [markdown]
# Counted from `config` alone. Do the arrays in memory agree?

# %%
def arrays_in(thing):
    if isinstance(thing, np.ndarray):
        return [thing]
    parts = [] if thing is None else [getattr(thing, name) for name in vars(thing)]
    return [array for part in parts for array in arrays_in(part)]


held = [*arrays_in(weights.embed_tokens), weights.norm,
        *(array for layer in weights.layers for array in arrays_in(layer))]
print(f"{sum(array.size for array in held):,} numbers in {len(held)} arrays, "
      f"{sum(array.nbytes for array in held) / 1e6:.0f} MB in {held[0].dtype}")
assert sum(array.size for array in held) == sum(parameters.values())

# %% [markdown]
# ## From the file to an array
#
# **Predict.** The file holds the same numbers. How many bits does it spend on each?

# %%
checkpoint = open_checkpoint(resolve("smollm2-135m-instruct"))
file_bytes = checkpoint.path.stat().st_size
print(f"{file_bytes / 1e6:.0f} MB in the file: {8 * file_bytes / sum(parameters.values()):.2f} "
      "bits a weight, everything included")
for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.norm"):
    block_format, raw = checkpoint.blocks(f"{name}.weight")
    print(f"{name:32} {block_format.name:5} rows of {raw.shape[-1]:5} bytes")

# %% [markdown]
# One block of 32 weights, taken apart by hand: a scale `d`, a smallest weight `m`, and 32 integers
# of four bits, two in a byte.

# %%
name = "model.layers.0.self_attn.q_proj.weight"
_, raw = checkpoint.blocks(name)
block = raw[0, :20].view(gguf_blocks.Q4_1_BLOCK)[0]
q = np.concatenate([block["q_pairs"] & 15, block["q_pairs"] >> 4])
print(f"d = {block['d']:.4f}, m = {block['m']:.4f}, q = {q}")
by_hand = np.float32(block["d"]) * q + np.float32(block["m"])
loaded = weights.layers[0].qkv_proj.weight[0, :32]
print(f"by hand {by_hand[:4].round(4)} …   loaded {loaded[:4].round(4)} …")
assert np.array_equal(by_hand.astype(np.float32), loaded)

# %% [markdown]
# One trap is left. RoPE turns pairs of numbers, and the file keeps the rows of q and k in an order
# that makes the pairs neighbours; ours are half a head apart. So the rows are moved while loading:

# %%
file_order = np.array(["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"])  # one head with D = 8
print(gguf.hugging_face_row_order(file_order[:, None], heads=1, num_rows=8)[:, 0])


def in_file_order(layer):
    """The layer with its q and k rows as they are in the file."""
    (H, K, D), matrix = config.heads, layer.qkv_proj.weight
    pairs = matrix[: (H + K) * D].reshape(H + K, 2, D // 2, -1).swapaxes(1, 2)
    rows = np.concatenate([pairs.reshape((H + K) * D, -1), matrix[(H + K) * D :]])
    return dataclasses.replace(layer, qkv_proj=Dense(rows))


# %% [markdown]
# **Predict.** What comes out if a loader forgets it: an error, noise, or text?

# %%
greedy = SamplingParams(temperature=0, max_tokens=8 if fast else 24)
prompt = "The three primary colours are"
print("right:    ", repr(llm.generate([prompt], greedy)[0].text))
llm.runner.weights = dataclasses.replace(weights, layers=list(map(in_file_order, weights.layers)))
print("forgotten:", repr(llm.generate([prompt], greedy)[0].text))
llm.runner.weights = weights

# %% [markdown]
# Nothing complains: every shape is right. That is why loaders are tested against the logits of
# another implementation, and not by whether they run.
#
# ## The whole model
#
# The config, the weights, a loop over the layers, the head:

# %%
source = inspect.getsource(model.forward_np)
print(source[source.index("    N, eps") :])

# %% [markdown]
# **Predict.** All layers read and write the same `x` [N, C]. If we stop after a few of them, and
# send that `x` through the last norm and the head: after how many layers is the answer there?

# %%
token_ids = llm.tokenizer.encode("The capital of France is")
print(f"x is [{len(token_ids)}, {config.hidden_size}] all the way, the logits "
      f"[1, {config.vocab_size}]")
for depth in (0, 1, 10, 20, 25, 28, 30):
    llm.runner.weights = dataclasses.replace(weights, layers=weights.layers[:depth])
    cache = llm.runner.new_cache(len(token_ids))
    logits = llm.runner.forward(token_ids, range(len(token_ids)), cache, [len(token_ids) - 1])[0]
    best = np.argsort(-logits)[:4]
    print(f"after {depth:2} layers: {[llm.tokenizer.decode([int(token)]) for token in best]}")
llm.runner.weights = weights

# %% [markdown]
# ## What one pass needs
#
# The whole chapter stands on this count, so read what it leaves out:

# %%
print(inspect.getsource(roofline.count_pass))

# %% [markdown]
# Is it right? PyTorch can count the operations of every matrix product that it runs. Its counter
# does not see into the fused attention kernel, so that part we count ourselves, pair by pair.

# %%
runners = {"NumPy fp32": llm.runner,
           "torch fp32": LLM(backend="torch", device="cpu", dtype="float32").runner,
           "torch bf16": LLM(backend="torch", device="cpu", dtype="bfloat16").runner}
H, K, D = config.heads
for num_tokens, num_cached in ((1, 0), (16, 0), (5, 11)):
    cache = runners["torch fp32"].new_cache(num_cached + num_tokens)
    if num_cached:
        runners["torch fp32"].forward(range(num_cached), range(num_cached), cache, [0])
    with FlopCounterMode(display=False) as counter:
        runners["torch fp32"].forward(range(num_tokens),
                                      range(num_cached, num_cached + num_tokens), cache, [0])
    pairs = sum(1 for query in range(num_cached, num_cached + num_tokens)
                for key in range(query + 1))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    seen = products + pairs * config.num_hidden_layers * H * (2 * D + 2 * D)
    counted, needed_bytes = roofline.count_pass(config, num_tokens, num_cached)
    print(f"{num_tokens:2} tokens behind {num_cached:2}: seen {seen:,}, counted {counted:,}")
    assert seen == counted

kept = sum(array.nbytes for array in held) + 4 * cache.keys[..., :16, :].numel() * 2
print(f"bytes: {kept:,} in arrays and cache, counted {needed_bytes:,}")
assert kept == needed_bytes

# %% [markdown]
# ## What this machine can do
#
# **Predict.** A pass of one token does two operations for each weight that it reads: half an
# operation for each byte in float32. How many operations a byte could your machine do before its
# memory stops being what it waits for: about 1, about 10, about 100?

# %%
size, num_bytes = (256, 2**24) if fast else (1024, 2**29)
bandwidth = machine.read_bandwidth(num_bytes, repeats=3)
peak = {"NumPy fp32": machine.flops_numpy(size), "torch fp32": machine.flops("float32", size),
        "torch bf16": machine.flops("bfloat16", size)}
print(f"reading: {bandwidth / 1e9:.1f} GB/s")
for name, flops_per_s in peak.items():
    print(f"{name}: {flops_per_s / 1e9:4.0f} GFLOP/s, so {flops_per_s / bandwidth:5.1f} "
          "operations a byte")

# %% [markdown]
# Half the bytes should be twice the speed, and a bfloat16 product should beat a float32 one: that
# is how bfloat16 is advertised. Compare the last two lines before you believe it of this machine.
#
# ## Passes under the roof
#
# **Predict.** Sketch it: x, operations a byte; y, operations a second. Where is the pass of one
# token, where that of a long prompt, and from which length on does the curve go flat?

# %%
lengths = (1, 4) if fast else (1, 4, 16, 64, 256)
passes = {name: roofline.Contestant(runner, 16) for name, runner in runners.items()}
seconds_of = {}  # (name, length): every sample
for _ in range(1 if fast else 3):
    for length in lengths:
        for name, contestant in passes.items():
            seconds_of.setdefault((name, length), []).extend(contestant.pass_seconds(length, 0))

print("ms of a pass:  " + "".join(f"{length:8}" for length in lengths) + "  tokens")
for name in runners:
    print(f"{name:15}" + "".join(f"{1000 * np.median(seconds_of[name, length]):8.0f}"
                                 for length in lengths))

# %%
picture, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
x = np.geomspace(0.3, 400, 100)
colours = {"NumPy fp32": "#0072B2", "torch fp32": "#E69F00", "torch bf16": "#E69F00"}
for axis, dtype, number_bytes in ((axes[0], "fp32", 4), (axes[1], "bf16", 2)):
    here = [name for name in runners if name.endswith(dtype)]
    top = max(peak[name] for name in here)
    axis.loglog(x, roofline.attainable(x, bandwidth, top) / 1e9, color="#009E73", label="roof")
    for name in here:
        needs = [roofline.count_pass(config, length, 0, number_bytes) for length in lengths]
        axis.loglog([operations / moved for operations, moved in needs],
                    [operations / np.median(seconds_of[name, length]) / 1e9
                     for (operations, _), length in zip(needs, lengths)],
                    "o-", color=colours[name], label=name)
    axis.set(xlabel="FLOPs a byte", title=dtype)
    axis.legend(frameon=False)
axes[0].set_ylabel("GFLOP/s")
plt.show()

# %% [markdown]
# Left of the corner the memory decides and more tokens in a pass cost little; right of it each
# token is paid for. How well does the roof alone predict the time of a pass?

# %%
for name, number_bytes in (("torch fp32", 4), ("torch bf16", 2)):
    for length in lengths:
        operations, moved = roofline.count_pass(config, length, 0, number_bytes)
        reading_ms, computing_ms = 1000 * moved / bandwidth, 1000 * operations / peak[name]
        print(f"{name}, {length:3} tokens: reading {reading_ms:6.1f} ms, computing "
              f"{computing_ms:7.1f} ms, measured {1000 * np.median(seconds_of[name, length]):7.1f}"
              f" ms; the {'memory' if reading_ms > computing_ms else 'arithmetic'} is the limit")

# %% [markdown]
# ## Your turn
#
# The exercise is `forward_np`. Whatever you write takes the place of the engine's own, right or
# wrong. Here, for a taste, is one that forgets where the tokens stand:

# %%
from minillm.model import forward_np  # by name, before `using` puts another in its place


def without_positions(weights, tokens, positions, cache, rows=None):
    return forward_np(weights, tokens, 0 * positions, cache, rows)


with using(forward_np=without_positions) as plugged:
    print(repr(llm.generate([prompt], greedy)[0].text))
print(plugged["forward_np"].calls, "passes")

# %% [markdown]
# Write yours in `chapters/05_model/exercise.py`, then:
#
# ```
# python -m minillm grade 05
# python -m minillm generate --impl chapters/05_model/exercise.py --temperature 0 "Once upon a time"
# ```

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
# # 04 · Attention
#
# Why is prefill quadratic, and need its memory be?
#
# We take the queries, keys and values of a real model while it reads a sentence, compute one
# query's answer by hand, look at who looks at whom, and then double the length until something
# hurts. The chapter's text is `chapters/04_attention/README.md`.

# %%
import inspect
import math
import os
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from minillm import LLM, SamplingParams
from minillm.attention import attention_np, attention_sdpa, online_softmax_attention_np
from minillm.bench import draw
from minillm.bench.attention import NAMES, peak_bytes, prepared
from minillm.bench.machine import seconds
from minillm.course import using
from minillm.model_runner import choose_device

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy", batching="none")
H, K, D = llm.config.heads
print(f"H = {H} query heads, K = {K} key/value heads, D = {D} numbers a head, "
      f"{llm.config.num_hidden_layers} layers")

# %% [markdown]
# ## What attention is given
#
# `using` puts any function in the place of the engine's attention. Ours remembers what it was
# called with, and passes it on. **Predict** the three shapes for a sentence of T tokens.

# %%
text = "The capital of France is Paris. The capital of Italy is"
token_ids = llm.tokenizer.encode(text)
words = [llm.tokenizer.decode([token]) for token in token_ids]
seen = []


def remember(q, k, v):
    seen.append((q, k, v))
    return attention_np(q, k, v)


with using(attention_np=remember):
    logits = llm.logits(token_ids)
print(len(token_ids), "tokens:", words)
print(len(seen), "calls, one a layer; the first:", [x.shape for x in seen[0]])
print("the model continues:", repr(llm.tokenizer.decode([int(logits[-1].argmax())])))

# %% [markdown]
# ## One query, by hand
#
# The last token asks, in one head of one layer. Its score with each key is a product of 64
# numbers, divided by √64. **Predict:** which word of the sentence could help it most to know what
# follows "The capital of Italy is"?

# %%
layer, head = 16, 3
q, k, v = seen[layer]
keys, values = k[head // (H // K)], v[head // (H // K)]  # three neighbours share one
scores = keys @ q[head, -1] / math.sqrt(D)
weights = np.exp(scores - scores.max())
weights = weights / weights.sum()
for s in np.argsort(-weights)[:5]:
    print(f"{words[s]!r:12} score {scores[s]:6.2f}   weight {weights[s]:.3f}")
by_hand = weights @ values
difference = np.abs(by_hand - attention_np(q, k, v)[head, -1]).max()
print("largest difference from attention_np:", difference)

# %% [markdown]
# ## Why divide, and why subtract
#
# **Predict:** what do the weights look like if nobody divides by √D? And what does
# `exp` give for a score of 1000, in float32?

# %%
undivided = np.exp(scores * math.sqrt(D) - (scores * math.sqrt(D)).max())
undivided = undivided / undivided.sum()
print(f"largest weight: {weights.max():.3f} divided, {undivided.max():.3f} undivided")
with np.errstate(over="ignore", invalid="ignore"):
    large = np.exp(np.array([1000, 999], dtype=np.float32))
    print("exp of 1000 and 999:", large, "  their softmax:", large / large.sum())
shifted = np.exp(np.array([0, -1], dtype=np.float32))
print("after subtracting the largest:", shifted, "  softmax:", shifted / shifted.sum())

# %% [markdown]
# ## Who may see whom
#
# T queries are the last of S positions. **Predict** the pattern for T = 3 and S = 5: which of the
# 15 pairs are visible?

# %%
T, S = 3, 5
print((np.arange(S) <= np.arange(S - T, S)[:, None]).astype(int))

# %% [markdown]
# Now the real thing. Values that are one-hot, a 1 at the place of their position, come out as
# the weights themselves: attention mixes them, and what is mixed is where each came from. Three
# heads that share one key/value head: same keys, but do they look at the same tokens?

# %%
S = len(token_ids)
one_hot = np.zeros_like(k)
one_hot[:, np.arange(S), np.arange(S)] = 1  # S is at most D here
pattern = attention_np(q, k, one_hot)[:, :, :S]  # [H, T, S]

figure, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained", sharey=True)
for panel, shown in zip(axes, range(3, 6)):
    image = panel.imshow(pattern[shown], cmap="cividis", vmin=0, vmax=1)
    panel.set_title(f"layer {layer}, head {shown} (keys of {shown // (H // K)})")
    panel.set_xticks(range(S), words, rotation=90, fontsize=8)
    panel.set_xlabel("key")
axes[0].set_yticks(range(S), words, fontsize=8)
axes[0].set_ylabel("query")
figure.colorbar(image, ax=axes, label="weight (a row sums to 1)")
plt.show()

# %% [markdown]
# The upper right triangle is empty: no token sees what comes after it. The three heads read the
# same keys and look at different tokens, because each asks with its own query. A bright first
# column is common: a head that finds nothing has to put its weight somewhere, since a row sums to
# 1, and the first token is always there (an "attention sink": Xiao et al. 2023).
#
# ## The code
#
# `attention_np` is yours to write, so here is its neighbour, which hands the same contract to
# PyTorch's fused kernel. Note what it has to say about T < S, and about shared heads when T = 1.

# %%
print(inspect.getsource(attention_sdpa))

# %% [markdown]
# ## Online softmax
#
# The scores of all keys need not be there at once. Take the keys in blocks of four, keep the
# `largest` score, the `total` and the mixed values, and shrink what is old whenever a larger
# score comes. **Predict:** in how many blocks of our sentence does `largest` change?

# %%
largest, total, out = -math.inf, 0.0, np.zeros(D)
for start in range(0, S, 4):
    block = scores[start : start + 4]
    new = max(largest, block.max())
    shrink = math.exp(largest - new)
    probs = np.exp(block - new)
    total = total * shrink + probs.sum()
    out = out * shrink + probs @ values[start : start + 4]
    largest = new
    print(f"keys {start:2}–{start + len(block) - 1:2}   largest {largest:6.2f}   "
          f"shrink {shrink:.4f}   total {total:7.4f}   first value {out[0] / total:+.5f}")
print("by hand, all at once:", f"{by_hand[0]:+.5f}")

# %% [markdown]
# After each block, `out / total` is the exact answer for the keys seen so far. It is not an
# approximation, and the size of a block does not matter:

# %%
for block_size in (1, 3, 4, 256):
    answer = online_softmax_attention_np(q, k, v, block_size=block_size)
    difference = np.abs(answer - attention_np(q, k, v)).max()
    print(f"block_size {block_size:3}: largest difference {difference:.1e}")

# %% [markdown]
# ## Double the length
#
# Random queries, keys and values, in the sizes of this model, T = S. **Predict** two factors for
# each doubling: of the time, and of the memory held at the worst moment. Then predict which of
# the two differs between naive, online and fused.

# %%
lengths = [16, 32, 64] if fast else [64, 128, 256, 512, 1024]
device = choose_device("auto")
times_ms, peaks_mib = {}, {}
for name in NAMES:
    for length in lengths:
        run = prepared(name, length, device)
        peaks_mib[name, length] = peak_bytes(name, run, device) / 2**20  # also the warm-up
        times_ms[name, length] = 1e3 * min(seconds(run) for _ in range(3))

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
colours = {"naive": draw.ORANGE, "online": draw.BLUE, "fused": draw.GREEN}
for panel, measured, label in zip(axes, (times_ms, peaks_mib), (
        "time, ms (best of 3)", "peak memory beyond the inputs, MiB")):
    for name in NAMES:
        panel.plot(lengths, [measured[name, length] for length in lengths], marker="o",
                   color=colours[name.partition(",")[0]], label=name,
                   linestyle="--" if "NumPy" in name else "-")
    last = measured["naive, torch", lengths[-1]]
    for slope, style in ((1, ":"), (2, "-.")):
        panel.plot(lengths, last * (np.array(lengths) / lengths[-1]) ** slope, style,
                   color=draw.GREY, label=f"slope {slope}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(lengths, lengths)
    panel.set_xlabel("length, tokens")
    panel.set_ylabel(label)
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# Towards the right, time runs parallel to slope 2 whatever the form; memory does so for naive
# alone. (Short lengths measure the overhead of calls, so they are flatter, and below 256 tokens
# one block holds all keys.) How many arrays of H·T·S numbers is that?

# %%
length = lengths[-1]
one_array_mib = H * length * length * 4 / 2**20
for name in NAMES:
    print(f"{name:14} {peaks_mib[name, length]:8.2f} MiB = "
          f"{peaks_mib[name, length] / one_array_mib:5.2f} × all scores of {length} tokens")

# %% [markdown]
# ## Does quadratic hurt?
#
# Count FLOPs. A weight costs 2 FLOPs a token; attention costs 4·H·D FLOPs for each position that
# a token sees. **Predict:** at what length does attention catch up with everything else in a
# layer: 100, 1000 or 10000 tokens?

# %%
C, F = llm.config.hidden_size, llm.config.intermediate_size
layer_weights = C * (H + 2 * K) * D + H * D * C + 3 * C * F
length = np.arange(1, 8193)
attention_flops = 4 * H * D * length  # of the last token, which sees them all
crossing = 2 * layer_weights / (4 * H * D)

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(length, attention_flops / 1e6, color=draw.ORANGE, label="attention")
axes.axhline(2 * layer_weights / 1e6, color=draw.BLUE, label="all matrices of the layer")
axes.axvline(crossing, color=draw.GREY, linestyle=":", label=f"equal at {crossing:.0f} tokens")
axes.set_xlabel("positions that the token sees")
axes.set_ylabel("MFLOP a token and layer")
axes.legend()
plt.show()

# %% [markdown]
# ## Real text through another attention
#
# `using` again, now with the online form in blocks of four keys, in all layers. The contract is
# the same, so the text must be.

# %%
params = SamplingParams(temperature=0.0, max_tokens=4 if fast else 24)
plain = llm.generate("Once upon a time", params)[0].text
with using(attention_np=partial(online_softmax_attention_np, block_size=4)) as plugged:
    online = llm.generate("Once upon a time", params)[0].text
print(online)
print(plugged["attention_np"].calls, "calls; the same text:", online == plain)

# %% [markdown]
# ## Your turn
#
# Write `attention_np` and `online_softmax_attention_np` in `chapters/04_attention/exercise.py`:
#
# ```
# python -m minillm grade 04
# python -m minillm generate --impl chapters/04_attention/exercise.py --temperature 0 "Once upon a time"
# ```
#
# You computed one query of one head by hand above. The first exercise does it for all queries of
# all heads at once, with the triangle as its mask. The second gives the recurrence above many
# queries instead of one, and the mask again; the README of the chapter lists the traps.

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
# # 03 · The transformer block
#
# What does one layer compute?
#
# We look into the layers of a real model while it reads a sentence: what is in them, what they
# do to a token, what happens when a rotation goes wrong, and where the time goes. The chapter's
# text is `chapters/03_transformer_block/README.md`.

# %%
import inspect
import os

import matplotlib.pyplot as plt
import numpy as np

from minillm import LLM, SamplingParams
from minillm.bench import draw
from minillm.bench.block import FUNCTIONS, PARTS, count, run_pass, timed_pass
from minillm.course import using
from minillm.linear import linear_np
from minillm.mlp import silu_np, swiglu_np
from minillm.model import forward_np
from minillm.norm import rms_norm_np
from minillm.rope import rope_angles_np, rope_frequencies, rope_np

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy")
config = llm.config
(H, K, D), C, F = config.heads, config.hidden_size, config.intermediate_size
print(f"C = {C} numbers a token, F = {F} in the feed-forward network, {H} query heads and {K} "
      f"key/value heads of D = {D}, {config.num_hidden_layers} layers")

# %% [markdown]
# ## Where the weights are
#
# **Predict**: of a layer's weights, which share belongs to attention (q, k, v and the output
# projection), and which to the feed-forward network?

# %%
layer = llm.runner.weights.layers[0]
sizes = {name: getattr(layer, name).weight.shape
         for name in ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
sizes |= {name: getattr(layer, name).shape
          for name in ("input_layernorm", "post_attention_layernorm")}
total = sum(np.prod(shape) for shape in sizes.values())
for name, shape in sizes.items():
    print(f"{name:26} {shape!s:12} {np.prod(shape):9,}   {100 * np.prod(shape) / total:5.1f} %")

# %% [markdown]
# And this is all that is done with them. Read the loop: two lines add something to `x`, and none
# replaces it.

# %%
print(inspect.getsource(forward_np))

# %% [markdown]
# ## The residual stream
#
# Each layer adds to the stream twice. **Predict**: how does the size of a token's row, its root
# mean square, change from the first layer to the last? And of the copy that each norm hands on?
#
# `using` puts any function in the place of the engine's norm. Ours looks at what passes.

# %%
text = "The capital of France is Paris. The capital of Italy is"
token_ids = llm.tokenizer.encode(text)
stream, handed_on = [], []


def root_mean_square(x):
    return np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1))


def watched_norm(x, weight, eps):
    stream.append(root_mean_square(x))
    handed_on.append(root_mean_square(rms_norm_np(x, np.ones_like(weight), eps)))
    return rms_norm_np(x, weight, eps)


with using(rms_norm_np=watched_norm):
    logits = llm.logits(token_ids)
best = int(logits[-1].argmax())
print(f"{len(stream)} norms, {len(token_ids)} tokens a norm; the next token: "
      f"{llm.tokenizer.decode([best])!r}")

# %%
stream, handed_on = np.array(stream), np.array(handed_on)  # [norms, T]
figure, axis = plt.subplots(figsize=(7, 3))
axis.plot(stream[:, 1:], color=draw.BLUE, alpha=0.4)
axis.plot(stream[:, 0], color=draw.ORANGE, linewidth=2)
axis.plot(handed_on, color=draw.GREEN)
axis.set_yscale("log")
axis.set_xlabel("norm, from the first layer to the last (two a layer)")
axis.set_ylabel("root mean square of a row")
for label, y, colour in (("the stream: first token", stream[30, 0], draw.ORANGE),
                         ("the stream: other tokens", stream[30, 1:].max(), draw.BLUE),
                         ("what the norm hands on", 1.0, draw.GREEN)):
    axis.annotate(label, (30, y), (0, 5), textcoords="offset points", color=colour)
plt.show()

# %% [markdown]
# The rows grow by orders of magnitude, and that of the first token by far the most: models park
# there what they do not need (an "attention sink"). No matrix has to cope with it, because each
# reads a copy whose scale is fixed. The norm is three lines:

# %%
print(inspect.getsource(rms_norm_np))
x = np.array([3.0, 4.0])
print("by hand:", x / np.sqrt((9 + 16) / 2), "  the function:", rms_norm_np(x, np.ones(2), 0.0))

# %% [markdown]
# ## Position as a rotation
#
# Each head of D = 64 numbers is 32 points in 32 planes, and position p turns plane i by
# p · inv_freq[i].

# %%
inv_freq = rope_frequencies(config)
print(inspect.getsource(rope_np))
print("radians a token, fastest and slowest plane:", inv_freq[0], inv_freq[-1])
print("turns in the whole context, fastest and slowest:",
      config.max_position_embeddings * inv_freq[[0, -1]] / (2 * np.pi))

# %% [markdown]
# Take a real query and a real key of the sentence, before they are turned, and place them
# anywhere. **Predict**: what does their dot product depend on? What happens to it if both move
# on by 1000 positions?

# %%
inputs = []


def remember(x, cos, sin):
    inputs.append(x)
    return rope_np(x, cos, sin)


with using(rope_np=remember):
    llm.logits(token_ids)
heads = inputs[10][-1].astype(np.float64)  # layer 10, last token: [H + K, D]
query, key = heads[:1][None], heads[H : H + 1][None]  # [1, 1, D]


def score(query_position, key_position):
    """The dot product of the two, each turned to its position."""
    turned = [rope_np(x, *rope_angles_np(np.array([position]), inv_freq))
              for x, position in ((query, query_position), (key, key_position))]
    return (turned[0] * turned[1]).sum() / np.sqrt(D)


for positions in ((5, 3), (1005, 1003), (5, 4), (1005, 1004)):
    print(f"query at {positions[0]:4}, key at {positions[1]:4}: {score(*positions):.10f}")

# %%
distances = np.arange(200)
figure, axis = plt.subplots(figsize=(7, 3))
for start, style in ((0, dict(color=draw.BLUE, linewidth=3)),
                     (5000, dict(color=draw.ORANGE, linestyle="--"))):
    axis.plot(distances, [score(start + distance, start) for distance in distances],
              label=f"key at position {start}", **style)
axis.set_xlabel("distance from the key to the query, tokens")
axis.set_ylabel("score (q·k / √D)")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# One curve, wherever the two stand: only the distance counts, to ten digits.
#
# ## The trap: which entries are a plane?
#
# Here entry i turns with entry i + D/2. In the paper, and in GGUF files of this architecture,
# neighbours turn together. Both are right with weights in the matching order. **Predict** what
# the model says if we turn neighbours and leave the weights alone: an error, the same text,
# slightly worse text, nonsense?

# %%
def neighbours(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


params = SamplingParams(temperature=0.0, max_tokens=8 if fast else 48)
prompt = "Once upon a time, there was a little"
print("halves:    ", llm.generate(prompt, params)[0].text.replace("\n", " "))
with using(rope_np=neighbours):
    print("neighbours:", llm.generate(prompt, params)[0].text.replace("\n", " "))

# %% [markdown]
# It does not crash, and it does not even begin badly: scores still depend on the distance alone,
# only with the wrong frequency in each plane. That is what makes the bug hard to find. A glance at
# the text does not measure it; the probability that the model gives to a real text does.

# %%
passage = llm.tokenizer.encode(
    "The heart is a muscular organ that pumps blood through the body. It has four chambers: two "
    "atria, which receive blood, and two ventricles, which push it out. Valves between the "
    "chambers keep the blood from flowing backwards.")


def mean_probability(token_ids):
    """The geometric mean of what the model gives to each token, knowing those before it."""
    scores = llm.logits(token_ids)[:-1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    log_probs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return np.exp(log_probs[np.arange(len(token_ids) - 1), token_ids[1:]].mean())


print(f"halves:     {mean_probability(passage):.3f}")
with using(rope_np=neighbours):
    print(f"neighbours: {mean_probability(passage):.3f}")

# %% [markdown]
# ## The gate
#
# **Predict**: for a token, how many of the F = 1536 numbers in the middle of the feed-forward
# network does the gate let through? Count those that carry 90 % of what arrives at the down
# projection, in a layer in the middle.

# %%
print(inspect.getsource(silu_np), inspect.getsource(swiglu_np), sep="\n")
gates, hidden = [], []


def watched_swiglu(x, gate_proj, up_proj, down_proj):
    gates.append(linear_np(x, gate_proj))
    hidden.append(silu_np(gates[-1]) * linear_np(x, up_proj))
    return linear_np(hidden[-1], down_proj)


with using(swiglu_np=watched_swiglu):
    llm.logits(token_ids)
middle = config.num_hidden_layers // 2
energy = np.sort(hidden[middle][1:] ** 2, axis=-1)[:, ::-1]  # without the first token
shares = energy.cumsum(axis=-1) / energy.sum(axis=-1, keepdims=True)
print("numbers that carry 90 % of the energy:", (shares < 0.9).sum(axis=-1) + 1, f"of {F}")

# %%
figure, axis = plt.subplots(figsize=(7, 3))
values = gates[middle][1:].ravel()
axis.hist(values, bins=np.linspace(-6, 6, 121), color=draw.BLUE, alpha=0.6)
axis.set_xlabel("gate z = x·Gᵀ, all tokens and numbers of one layer")
axis.set_ylabel("how many", color=draw.BLUE)
curve, z = axis.twinx(), np.linspace(-6, 6, 200)
curve.plot(z, silu_np(z), color=draw.ORANGE)
curve.set_ylabel("silu(z)", color=draw.ORANGE)
plt.show()
print(f"{100 * (values < 0).mean():.0f} % of the gates are below 0")

# %% [markdown]
# ## Where the time goes
#
# `count` says what each part of a pass has to compute and to move; `timed_pass` wraps the
# functions that the pass calls in timers. **Predict** two bars: the share of FLOPs, and the share
# of time, of everything that is neither a matrix product nor attention.

# %%
num_tokens = 32 if fast else 256
tokens = (token_ids * num_tokens)[:num_tokens]
cache = llm.runner.new_cache(num_tokens)
timed, untimed = [], []
for _ in range(2 if fast else 6):
    cache.truncate(0)
    untimed.append(run_pass(llm.runner, cache, tokens))
    cache.truncate(0)
    timed.append(timed_pass(llm.runner, cache, tokens))
timed, untimed = timed[1:], untimed[1:]  # the first touches the cache's memory
counted = count(config, num_tokens, num_tokens)
bars = {"FLOPs": {part: counted[part]["flops"] for part in PARTS},
        "bytes": {part: counted[part]["bytes"] for part in PARTS},
        "time": {part: np.median([seconds[part] for seconds in timed]) for part in PARTS}}
whole_ms = 1e3 * np.median([sum(seconds.values()) for seconds in timed])
print("timed from outside:", sorted(FUNCTIONS), "and every matrix product")
print(f"a pass with timers {whole_ms:.0f} ms, without {1e3 * np.median(untimed):.0f} ms")

# %%
figure, axis = plt.subplots(figsize=(7, 3.4))
for place, (name, colour) in enumerate(zip(bars, (draw.BLUE, draw.SKY, draw.ORANGE))):
    shares = np.array([bars[name][part] for part in PARTS]) / sum(bars[name].values())
    axis.barh(np.arange(len(PARTS)) + 0.27 * (place - 1), 100 * shares, height=0.25, color=colour,
              label=name)
axis.set_yticks(range(len(PARTS)), PARTS)
axis.invert_yaxis()
axis.set_xlabel(f"share of a prefill of {num_tokens} tokens, NumPy, %")
axis.legend(frameon=False)
plt.show()
small = ("norms", "rope", "silu and gating", "residuals and the rest")
for name, amounts in bars.items():
    share = sum(amounts[part] for part in small) / sum(amounts.values())
    print(f"norms, rope, silu and the rest: {100 * share:5.2f} % of the {name}")

# %% [markdown]
# Hardly any arithmetic, a good part of the traffic, and time to match: each `*`, `/` and `tanh`
# is a pass over memory of its own. The benchmark does the same with both twins and with decoding:
# `python -m minillm bench block`.
#
# ## Your turn
#
# Write `rms_norm_np`, `rope_np` and `swiglu_np` in `chapters/03_transformer_block/exercise.py`,
# each in three or four lines, and let them speak:
#
# ```
# python -m minillm grade 03
# python -m minillm generate --backend numpy --impl chapters/03_transformer_block/exercise.py --temperature 0 "Once upon a time"
# ```
#
# In a notebook, `using` does what `--impl` does. Here is a norm that is wrong in a small way: it
# forgets the root. What does the model make of it? And your own mistakes?

# %%
def without_root(x, weight, eps):
    return x / ((x * x).mean(axis=-1, keepdims=True) + eps) * weight


with using(rms_norm_np=without_root) as plugged:
    print(llm.generate(prompt, params)[0].text.replace("\n", " "))
print(plugged["rms_norm_np"].calls, "calls of your function")

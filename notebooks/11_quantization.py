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
# # 11 · Quantization
#
# What do fewer bits cost, and what do they buy?
#
# We quantize rows of the real model and look at what its largest numbers do to the others, choose
# bad scales on purpose, meet an activation that is ten thousand times its neighbours, and then ask
# what the model itself says to all this. The chapter's text is `chapters/11_quantization/README.md`.

# %%
import inspect
import os

import matplotlib.pyplot as plt
import numpy as np

from minillm import LLM, SamplingParams
from minillm.bench.draw import BLUE, GREEN, GREY, ORANGE, RED
from minillm.course import using
from minillm.evaluation import kl_divergence_np, log_softmax_np
from minillm.mlp import swiglu_np
from minillm.norm import rms_norm_np
from minillm.quantization import (
    dequantize_group_np, pack_int4_np, quantize_group_np, quantize_int8_np, quantized_matmul_np,
    unpack_int4_np)
from minillm.smoothquant import smoothing_factors_np

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy", batching="none")
layers = llm.runner.weights.layers
embedding = llm.runner.weights.embed_tokens.weight  # [V, C]
print("embedding [V, C]:", embedding.shape, "· down_proj of a layer [C, F]:",
      layers[28].down_proj.weight.shape)


def error_against(exact, approximate):
    """Root mean square of the error, relative to that of the exact numbers."""
    return float(np.sqrt(((approximate - exact) ** 2).mean() / (exact**2).mean()))


# %% [markdown]
# ## A row, and the steps of its ruler
#
# Symmetric int8 lays a ruler with 255 marks over a row, from −max|row| to max|row|, and moves each
# number to the nearest mark. The distance of two marks is the *scale*. **Predict first:** the row
# below has 576 numbers. What share of them is within a tenth of the ruler's middle?

# %%
print(inspect.getsource(quantize_int8_np))
row = embedding[llm.tokenizer.encode(" king")[0]][None]  # [1, C]
q, scale = quantize_int8_np(row)
print(f"scale {scale[0, 0]:.5f}, largest |q| {np.abs(q.astype(int)).max()}, "
      f"median |q| {np.median(np.abs(q)):.0f}")
print(f"within a tenth of the middle: {(np.abs(q) <= 12).mean():.0%}")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.hist(row[0], bins=60, color=BLUE)
left.set_xlabel("value")
left.set_ylabel("numbers of the row")
left.set_title("the embedding of ' king'")
right.hist(q[0], bins=np.arange(-127.5, 128, 4), color=ORANGE)
right.set_xlabel("q, −127 … 127")
right.set_title("the same, as int8")
plt.show()

# %% [markdown]
# Most numbers crowd in the middle, and the ruler has to reach the loneliest of all: more than half
# of its marks measure nothing. With 255 marks that hardly matters; with 16 it does.
#
# ## One outlier
#
# Here is the row of this model in which the largest number stands out most. **Predict first:** the
# largest number is 28 standard deviations out. By how much do the other 1535 get coarser because it
# is there?

# %%
matrix = layers[28].down_proj.weight
row = matrix[[int((np.abs(matrix).max(axis=1) / matrix.std(axis=1)).argmax())]]  # [1, F]
outlier = int(np.abs(row).argmax())
others = np.delete(row, outlier, axis=1)
print(f"standard deviation {row.std():.3f}; the outlier {row[0, outlier]:.2f}, the next "
      f"{np.abs(others).max():.2f}")
q, scale = quantize_int8_np(row)
print(f"with it:    scale {scale[0, 0]:.4f}, error of the others "
      f"{error_against(others, np.delete(q * scale, outlier, axis=1)):.4f}")
q, scale = quantize_int8_np(others)
print(f"without it: scale {scale[0, 0]:.4f}, error of the others "
      f"{error_against(others, q * scale):.4f}")

# %% [markdown]
# The scale of all is made by one. The remedy is as plain as the disease: let fewer numbers share a
# scale, so that an outlier spoils only its neighbours. These are *groups*.
#
# ## Groups: error against bits
#
# A scale and a minimum in float16 cost 32 bits a group, a symmetric group's scale 16. So a weight
# has 4 + 32/G or 4 + 16/G bits. **Predict first:** which of the two is better at the same number of
# bits? And what will be the error of groups of 32 in `down_proj`, whose Q4_1 file has groups of 32
# with a scale and a minimum?

# %%
matrices = {"embedding (in the file: 8 bits)": embedding[: 512 if fast else 8192],
            "down_proj (in the file: 4 bits)": layers[28].down_proj.weight}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for axis, (name, matrix) in zip(axes, matrices.items()):
    for symmetric, label, colour in ((False, "asymmetric", BLUE), (True, "symmetric", ORANGE)):
        bits, errors = [], []
        for group_size in (16, 32, 64, 128, 192, matrix.shape[1]):
            quantized = quantize_group_np(matrix, group_size, symmetric)
            bits.append(4 + (16 if symmetric else 32) / group_size)
            errors.append(error_against(matrix, dequantize_group_np(*quantized, group_size)))
            if group_size <= 128:
                axis.annotate(group_size, (bits[-1], errors[-1]), (6, -12 if symmetric else 4),
                              textcoords="offset points", fontsize=7, color=colour)
        print(f"{name}, {label}: " + "  ".join(f"{error:.3f}" for error in errors))
        axis.plot(bits, errors, "o-", color=colour, label=f"4 bits, {label}")
    q, scale = quantize_int8_np(matrix)
    axis.axhline(error_against(matrix, q * scale), color=GREEN, label="int8 by row: 8.1 bits")
    axis.set_xlabel("bits a weight (at the points: group size)")
    axis.set_title(name, fontsize=9)
axes[0].set_ylabel("relative error")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Left, where the file has eight bits, smaller groups are better and cost more bits, and the two
# kinds lie on one curve: a minimum buys as much as symmetric groups of half the size, which cost the
# same. Right, one point has no error at all: asymmetric groups of 32. It is not that good; it is
# what the file did already. Its numbers have at most 16 values in each group of 32, and the same
# grid finds them again. Any *other* grid has to round what was rounded before; even groups of 16
# do, which have other smallest and largest numbers.

# %%
group = layers[28].down_proj.weight[0, :32]
print("different values among 32 neighbours:", len(np.unique(group)))
print("in the next 32:", len(np.unique(layers[28].down_proj.weight[0, 32:64])),
      "· in the whole row:", len(np.unique(layers[28].down_proj.weight[0])))

# %% [markdown]
# Keep this in mind for every quality figure of this chapter: what is measured is the distance from
# *this file*. The way from the original weights to the file has been gone before, by others.
#
# ## A bad scale
#
# Nothing says that the largest number has to fit. A smaller scale clips the largest numbers and
# measures all others more finely; a larger one leaves marks unused. **Predict first:** draw the
# error against the scale, as a multiple of max|row| / 7, for 4 bits. Is the lowest point at 1?

# %%
factors = np.geomspace(0.1, 6, 60)
king = embedding[llm.tokenizer.encode(" king")[0]]
for name, each, colour in (("' king'", king, BLUE), ("the row with the outlier", row[0], RED)):
    name = f"{name}, largest at {np.abs(each).max() / each.std():.1f} σ"
    errors = []
    for factor in factors:
        scale = factor * np.abs(each).max() / 7
        errors.append(error_against(each, scale * np.clip(np.round(each / scale), -7, 7)))
    best = int(np.argmin(errors))
    print(f"{name}: best at {factors[best]:.2f}, error {errors[best]:.3f}; "
          f"at 1, {np.interp(1, factors, errors):.3f}")
    plt.plot(factors, errors, color=colour, label=name)
    plt.plot(factors[best], errors[best], "o", color=colour)
plt.axvline(1, color=GREY, linewidth=0.8)
plt.text(0.95, 1.02, "clipped ←", ha="right", color=GREY)
plt.text(1.05, 1.02, "→ coarse", color=GREY)
plt.xscale("log")
plt.xlabel("scale, as a multiple of max|row| / 7")
plt.ylabel("relative error")
plt.ylim(0, 1.1)
plt.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# To the right more and more numbers become 0. The lowest point is left of 1: clipping a few numbers
# pays, and with it one lonely number no longer makes the scale of all. In the row with the 28 σ,
# nothing helps: clipped or coarse, one scale for 1536 numbers is too few. Methods that search for
# the scale live on this curve. They need not minimise this error, though: not all weights meet
# activations of the same size. GPTQ and AWQ look at data for that reason.
#
# ## Activations
#
# If both sides of a product are integers, it can be done by the processor's integer units: W8A8.
# The activations arrive one token at a time, and are quantized then. We listen to what `down_proj`
# is given while the model reads a text. **Predict first:** by what factor does the largest number
# exceed a typical one?

# %%
text = ("It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
        "age of foolishness, it was the epoch of belief, it was the epoch of incredulity.")
token_ids = llm.encode_prompt(text)
down_inputs, norm_outputs = [], []


class Listening:
    """A matrix that keeps what it is multiplied with."""

    bias = None

    def __init__(self, matrix):
        self.matrix = matrix

    def matmul_np(self, x):
        down_inputs.append(x)
        return self.matrix.matmul_np(x)


def listening_swiglu(x, gate_proj, up_proj, down_proj):
    return swiglu_np(x, gate_proj, up_proj, Listening(down_proj))


def listening_norm(x, weight, eps):
    norm_outputs.append(rms_norm_np(x, weight, eps))
    return norm_outputs[-1]


with using(swiglu_np=listening_swiglu, rms_norm_np=listening_norm):
    logits = llm.logits(token_ids)
first = [np.abs(x[0]).max() for x in down_inputs]
rest = [np.abs(x[1:]).max() for x in down_inputs]
typical = [np.median(np.abs(x)) for x in down_inputs]
plt.figure(figsize=(7, 3))
plt.plot(first, "o-", color=RED, label="largest, first token")
plt.plot(rest, "o-", color=BLUE, label="largest, all other tokens")
plt.plot(typical, "o-", color=GREY, label="median of all")
plt.yscale("log")
plt.xlabel("layer")
plt.ylabel("|input of down_proj|")
plt.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# In layers 11 and 28 the first token, whatever it says, has single numbers in the thousands:
# *massive activations* (Sun et al. 2024). The model uses that token as a place to look when there is
# nothing to look for. **Predict first:** layer 11's first token has 1536 numbers. How many are not 0 after
# int8 with one scale for the token? And what happens to the *other* tokens if all tokens share one
# scale?

# %%
x, down = down_inputs[11], layers[11].down_proj.weight
q, scale = quantize_int8_np(x)
print(f"first token: largest {np.abs(x[0]).max():.0f}, median {np.median(np.abs(x[0])):.3f}, "
      f"scale {scale[0, 0]:.1f}: {np.count_nonzero(q[0])} of {x.shape[1]} are not 0")
q_of_all, scale_of_all = quantize_int8_np(x.reshape(1, -1))
choices = {"a scale for each token": q * scale,
           "one scale for all tokens": (q_of_all * scale_of_all).reshape(x.shape)}
for name, approximate in choices.items():
    errors = [error_against(a @ down.T, b @ down.T) for a, b in zip(x, approximate)]
    print(f"{name}: error of the product, first token {errors[0]:.3f}, "
          f"median of the others {np.median(errors[1:]):.3f}")

# %% [markdown]
# Almost all of the first token's numbers are gone, and its product is nearly right all the same: it
# *is* its largest number, times a column of the matrix. A scale of its own confines the damage to
# that token. With one scale for all, the others become zeros altogether. So "by token" is no detail.
#
# ## Outliers that all tokens have
#
# Behind the norms it looks different: there it is certain *channels* that are large, in all tokens.
# A scale by token cannot confine these: every token has one.

# %%
layer = 12
h, qkv = norm_outputs[2 * layer], layers[layer].qkv_proj.weight
channel_max = np.abs(h).max(axis=0)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.imshow(np.abs(h), aspect="auto", cmap="Purples", vmax=4)
left.set_xlabel("channel")
left.set_ylabel("token")
left.set_title(f"|input of qkv_proj|, layer {layer}", fontsize=9)
right.plot(channel_max, color=RED, label="activations")
right.plot(np.abs(qkv).max(axis=0), color=BLUE, label="weights")
right.set_xlabel("channel")
right.set_title("largest of each channel", fontsize=9)
right.legend(frameon=False)
plt.show()
scale = quantize_int8_np(h)[1]
print(f"median |x| {np.median(np.abs(h)):.3f}, median scale {np.median(scale):.3f}: "
      "a typical number is about as large as a step of its ruler")

# %% [markdown]
# SmoothQuant (Xiao et al. 2023) takes the difficulty where there is room for it: divide channel j of
# the activations by some s_j, and multiply column j of the weights by it. The product is the same.
#
#     s_j = max|x_j|^α / max|W_j|^(1 − α)
#
# The division costs nothing, as the norm's own weight can swallow it. We take s from the first half
# of the text and measure on the second. **Predict first:** does it help here? And at `down_proj`,
# where the outlier is one token's and not one channel's?

# %%
def w8a8_error(x, weight, smoothing):
    """Error of the int8 product of x / smoothing and weight·smoothing, median over tokens."""
    q_x, scale_x = quantize_int8_np(x / smoothing)
    q_w, scale_w = quantize_int8_np(weight * smoothing)
    y = (q_x.astype(np.float32) @ q_w.T.astype(np.float32)) * scale_x * scale_w.T
    return np.median([error_against(a, b) for a, b in zip(x @ weight.T, y)])


half = len(token_ids) // 2
for name, x, weight in ((f"qkv_proj of layer {layer}", h, qkv),
                        ("down_proj of layer 11", down_inputs[11], down)):
    errors = {}
    for alpha in (0.0, 0.25, 0.5, 0.75):
        largest = np.abs(x[:half]).max(axis=0), np.abs(weight).max(axis=0)
        s = smoothing_factors_np(*largest, alpha)
        errors[f"α = {alpha}"] = w8a8_error(x[half:], weight, s)
    print(f"{name}: as it is {w8a8_error(x[half:], weight, np.ones(len(s))):.4f} · "
          + " · ".join(f"{key} {error:.4f}" for key, error in errors.items()))

# %% [markdown]
# At `qkv_proj` it wins clearly. At `down_proj`, the stronger α, the more the massive number of the
# first token decides: s of its channel is huge, the column of the weights grows with it, and now the
# *weights* have an outlier, which every token pays for. A method that is right for one kind of
# outlier is wrong for another: look which kind it is.
#
# ## Packing
#
# No machine has a type of four bits. Two numbers share a byte; what multiplies takes them apart
# again, in its registers if it is fast, and in memory if it is NumPy. **Predict first:** what are
# the bytes of 1, 2, 15, 0?

# %%
print(inspect.getsource(pack_int4_np))
print(pack_int4_np(np.array([[1, 2, 15, 0]], dtype=np.uint8)))
q, scale, minimum = quantize_group_np(down, 64)
packed = pack_int4_np(q)
print(f"float32 {down.nbytes:,} bytes; packed {packed.nbytes:,} and "
      f"{scale.size * 2 + minimum.size * 2:,} for scales and minima in float16")
assert (unpack_int4_np(packed, down.shape[1]) == q).all()

# %% [markdown]
# The product need not build the matrix. In each group, the scale can wait until the integers have
# been multiplied, and the minimum, which is the same for the whole group, meets the sum of the
# activations.

# %%
print(inspect.getsource(quantized_matmul_np))
product = quantized_matmul_np(x[:3], packed, scale, minimum, 64)
expected = x[:3] @ dequantize_group_np(q, scale, minimum, 64).T
print(f"the same as with the matrix in float32, but for {error_against(expected, product):.0e}")

# %% [markdown]
# ## What does the model say?
#
# An error of a matrix is not yet a worse text. We compare what the model predicts after each token
# of the text above with what it predicted with the file's weights in float32: the mean
# Kullback-Leibler divergence (KLD; 0 is "the same"), and how often the best token is the same.
# **Predict first:** put these in order: `int8`, `w8a8`, `int4` (groups of 32), `int4-sym`,
# `int4-g64`, and weights as they are with a *KV cache* of int8, a scale for each head of a token.

# %%
exact = log_softmax_np(logits)


def compared(candidate_logits):
    """(mean KLD, share of the same best token) against the float32 model."""
    other = log_softmax_np(candidate_logits)
    return (kl_divergence_np(other, exact).mean(),
            (exact.argmax(axis=1) == other.argmax(axis=1)).mean())


w8a8 = LLM("smollm2-135m-instruct", backend="numpy", quantize="w8a8")
int8_cache = LLM("smollm2-135m-instruct", backend="numpy", kv_dtype="int8")
formats = ("int4", "int4-sym") if fast else ("int8", "int4", "int4-sym", "int4-g64")
line = "{:13} KLD {:.4f}, same best token {:.0%}"
print(line.format("KV cache int8", *compared(int8_cache.logits(token_ids))))
print(line.format("w8a8", *compared(w8a8.logits(token_ids))))
for name in formats:
    quantized = LLM("smollm2-135m-instruct", backend="numpy", quantize=name)
    print(line.format(name, *compared(quantized.logits(token_ids))))

# %% [markdown]
# Forty tokens are an impression and no measurement (the chapter has one). But the order is no
# accident: `int4` finds the file's own grid again and loses next to nothing, and the symmetric grid
# with the same groups has to round it anew.
#
# ## Your own function in the engine
#
# `using` puts any function in the place of `quantize_int8_np`, while the model runs: the W8A8 model
# calls it for the activations of each matrix. Here is one that takes one scale for all tokens.
# **Predict first**, from what you saw in layer 11.

# %%
def one_scale_for_all(x):
    q, scale = quantize_int8_np(x.reshape(1, -1))
    return q.reshape(x.shape), np.repeat(scale, len(x), axis=0)


params = SamplingParams(temperature=0, max_tokens=6 if fast else 12)
print("by token: ", repr(w8a8.generate("The capital of France is", params)[0].text))
with using(quantize_int8_np=one_scale_for_all) as plugged:
    print(line.format("one scale", *compared(w8a8.logits(token_ids))))
    print("one scale:", repr(w8a8.generate("The capital of France is", params)[0].text))
print(plugged["quantize_int8_np"].calls, "calls")

# %% [markdown]
# It may still know the capital, and it has lost its thread. A mistake in a quantizer does not crash.
#
# ## What does it buy?
#
# A decoded token reads every weight once. **Predict first:** if weights have half or a quarter of
# the bits, what happens to the time of a token? In NumPy the answer is: it grows, since there is no
# product of few bits, and the weights are turned into floats at every use. The PyTorch path reads the
# bits as they are: through a kernel of our own where the processor has the instructions for it, and
# through PyTorch's operators elsewhere.

# %%
num_tokens, rounds = (4, 1) if fast else (24, 3)
names = ("bf16", "int4") if fast else ("bf16", "int8", "int4")
models = {name: LLM("smollm2-135m-instruct", quantize=name, batching="none") for name in names if name != "bf16"}
models["bf16"] = LLM("smollm2-135m-instruct", dtype="bfloat16", batching="none")
params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
tpot_ms = {name: [] for name in names}
for model in models.values():
    model.generate("Once", SamplingParams(temperature=0, max_tokens=2))  # a warm-up
for _ in range(rounds):  # in turns, so that a busy moment hits them all
    for name, model in models.items():
        tpot_ms[name].append(model.generate("Once upon a time", params)[0].metrics.tpot_ms)
colours = {"bf16": GREY, "int8": BLUE, "int4": ORANGE}
for position, name in enumerate(names):
    samples = tpot_ms[name]
    print(f"{name}: {np.median(samples):.1f} ms a token")
    plt.bar(position, np.median(samples), color=colours[name], width=0.6)
    plt.plot([position] * len(samples), samples, "k.")
plt.xticks(range(len(names)), names)
plt.ylabel("time of a token, ms (bar: median)")
if fast:
    plt.title("MINILLM_FAST: no measurement")
plt.show()

# %% [markdown]
# Compare the ratios with the bits: 16, about 8, about 6. From `int8` to `int4` the time shrinks by less
# than the bytes: the rest has nothing to do with weights (attention, norms, and calling a few hundred
# small operations a token, chapter 12). From `bf16` it may well shrink by more, since only the formats
# of few bits have a kernel of our own. `python -m minillm bench quantization` measures all formats, in turns, with quality
# beside speed. With MINILLM_FAST=1, as in a test, the picture above has one short run a format.
#
# ## The exercise
#
# Write `quantize_int8_np`, `quantize_group_np`, `pack_int4_np` and `quantized_matmul_np` in
# `chapters/11_quantization/exercise.py`. `python -m minillm grade 11` checks them, and
# `python -m minillm generate --quantize int4 --impl chapters/11_quantization/exercise.py --temperature 0 "Once upon a time"`
# quantizes the whole model with your functions, and writes with it.

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
# # 08 · Batching
#
# Why does a second request cost almost nothing?
#
# We time steps of one, two, four … sequences, and put beside them what the machine allows. Then we
# pack real prompts of unequal length into one rectangle, look at the mask that keeps them apart,
# break it on purpose, write several answers at once, and count what the rectangle wastes. The
# chapter's text is `chapters/08_batching/README.md`.

# %%
import inspect
import os

import numpy as np
from matplotlib import pyplot as plt

from minillm import LLM, SamplingParams
from minillm.batching import PaddedCache, decode_batch, pad_batch, padded_mask_np
from minillm.bench.batching import (
    KINDS, PANELS, count_batches, count_rows, describe, draw_one_batch, draw_speeds, in_batches,
    knee, share_limits, turn)
from minillm.bench.peers import measure_limits
from minillm.bench.workload import ANSWER_LENGTHS, PROMPT_LENGTHS, draw_lengths
from minillm.course import using

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy", batching="static")
runner, config = llm.runner, llm.config
(H, K, D), L = config.heads, config.num_hidden_layers

# %% [markdown]
# ## What does a second sequence cost?
#
# A step takes one new token of every sequence through the model: with B sequences, B rows. Row by
# row the arithmetic is the same, whoever it belongs to. The weights are read once for all of them.
#
# **Predict first:** if one token takes 25 ms, how long does a step of 2 take? Of 8? Of 32? Will
# NumPy and torch agree?

# %%
print(inspect.getsource(turn))
num_tokens = 8 if fast else 128
sizes = (1, 2) if fast else (1, 2, 4, 8, 16, 32)
runners = {"NumPy fp32": runner,
           "torch fp32": LLM("smollm2-135m-instruct", device="cpu", dtype="float32").runner}
samples = []
for name, each in runners.items():
    turn(each, 1, num_tokens)  # wakes its threads up
    for size in sizes:
        samples.append({"variant": name, "batch_size": size, "step_s": turn(each, size, num_tokens)})
        ms = 1000 * np.median(samples[-1]["step_s"])
        print(f"{name}, {size:2} sequences: {ms:4.0f} ms a step, {1000 * size / ms:4.0f} tokens/s")

# %% [markdown]
# Look at the step from one to two in each of the two. What you see at a *single* step may be the
# library: a matrix times one vector is another routine than a matrix times two, and the second one
# has to earn its set-up first. From there on, doubling the batch should cost far less than double.
#
# ## What does the machine allow?
#
# A step needs all weights once, the cached keys and values of every sequence, and two operations a
# weight and row. **Predict first:** which of these grow with the batch? At which batch size does
# arithmetic take longer than reading?

# %%
limits = measure_limits()
about = describe(runner, limits, bits=(32, 32))
for key, unit, scale in (("weight_bytes", "MB of weights", 1e6),
                         ("read_bytes_per_s", "GB/s", 1e9), ("flops_per_s", "GFLOP/s", 1e9)):
    print(f"{about[key] / scale:6.0f} {unit}")
print(f"{about['cache_bytes_a_token'] * num_tokens / 1e6:6.1f} MB of keys and values a sequence")
print(f"reading and arithmetic take as long as each other at {knee(about, num_tokens):.0f} sequences")
result = {"arguments": {"prompt_tokens": num_tokens}, "samples": samples,
          "variants": {name: about for name in runners}}
draw_speeds(plt.gca(), result, PANELS[0][1])
share_limits([plt.gca()])
plt.ylabel("output tokens/s, all sequences")
plt.title("numbers are batch sizes")
plt.show()

# %% [markdown]
# To the right is what one user waits for a token, upwards what all users get together. While the
# line climbs steeply, company is nearly free; where it bends to the right, every further sequence is
# paid for by all. One run is no measurement: `python -m minillm bench batching` does it in turns.
#
# ## Three prompts, one rectangle
#
# A pass wants B rows of equal length, and prompts have different ones. **Predict first:** should
# the padding stand in front of the short prompts, or behind them? Where would the next token go?

# %%
prompts = ["The capital of France is", "Once upon a time there was a", "Water boils at"]
prompt_token_ids = [llm.encode_prompt(prompt) for prompt in prompts]
print(inspect.getsource(pad_batch))
tokens, positions, num_padding = pad_batch(prompt_token_ids)
for row, row_positions, count in zip(tokens, positions, num_padding):
    words = ["·" if column < count else llm.tokenizer.decode([int(token)])
             for column, token in enumerate(row)]
    print(" ".join(f"{word!s:>9}" for word in words), f"   {count} of padding")
    print(" ".join(f"{position:9}" for position in row_positions))

# %% [markdown]
# Padding in front: all prompts end in the last column, and every answer begins in the next. The
# cache stays a rectangle, and one number, its length, is true of all sequences.
#
# ## The mask
#
# **Predict first:** a query sees its own sequence's keys up to itself. What should a query of the
# *padding* see, given that nobody reads its answer?

# %%
print(inspect.getsource(padded_mask_np))
T = tokens.shape[1]
visible = padded_mask_np(num_padding, T, T)  # [B, T, S]
figure, axes = plt.subplots(1, len(prompts), figsize=(8, 2.8), sharey=True)
for axis, mask, count in zip(axes, visible, num_padding):
    axis.imshow(mask, cmap="Greens", vmin=0, vmax=1.6)
    axis.set_title(f"{count} of padding", fontsize=9)
    axis.set_xlabel("key (column)")
axes[0].set_ylabel("query (column)")
plt.show()

# %% [markdown]
# Each has its own triangle. Padding sees itself: a softmax over nothing at all would be 0/0, and one
# NaN spreads to everything that it touches.
#
# ## Does it matter?
#
# Five ways to take the three prompts through the model, compared with each prompt alone: as above;
# with bananas for padding; with the columns as positions; with a mask that was told that there is no
# padding; and with both, bananas and that mask. **Predict first:** which of these change the logits?

# %%
alone = np.stack([runner.forward(ids, range(len(ids)), runner.new_cache(T), rows=[-1])[0]
                  for ids in prompt_token_ids])
columns = np.tile(np.arange(T), (len(prompts), 1))
another = pad_batch(prompt_token_ids, pad_token_id=llm.encode_prompt(" banana")[0])[0]
last_rows = list(range(T - 1, tokens.size, T))
for name, (some_tokens, some_positions, some_padding) in {
        "as above": (tokens, positions, num_padding),
        "bananas for padding": (another, positions, num_padding),
        "columns as positions": (tokens, columns, num_padding),
        "padding is seen": (tokens, positions, np.zeros_like(num_padding)),
        "bananas are seen": (another, positions, np.zeros_like(num_padding))}.items():
    cache = PaddedCache(config, some_padding, capacity=T)
    logits = runner.forward(some_tokens.ravel(), some_positions.ravel(), cache, last_rows)
    best = [llm.tokenizer.decode([int(token)]) for token in logits.argmax(axis=1)]
    print(f"{name:21} largest difference {np.abs(logits - alone).max():8.1e}   then {best}")

# %% [markdown]
# What the padding *is* does not matter, as long as nobody sees it. That the positions do not matter
# either may be a surprise: rotary embeddings turn queries and keys, and only the *difference* of two
# positions is left in their product (chapter 03). All tokens of a sequence were moved by the same
# distance. In a model that adds a learned vector for each position it would be another text, so
# positions are counted from the first token of the prompt.
#
# ## Answers, side by side
#
# `decode_batch` picks a token for every row, feeds all of them back, and goes on until the last row
# has finished. **Predict first:** the answers below may have 4, 16 and 8 tokens. How many passes
# does that take after the prompts? How many rows, and how many of these for nothing?

# %%
print(inspect.getsource(decode_batch))
lengths = (2, 4, 3) if fast else (4, 16, 8)
params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
together = llm.generate(prompts, params)
for prompt, each, output in zip(prompts, params, together):
    by_itself = llm.generate([prompt], each)[0]
    print(f"{prompt!r} … {output.text!r}   the same alone: {output.token_ids == by_itself.token_ids}")
counts = count_rows([(len(ids), length) for ids, length in zip(prompt_token_ids, lengths)])
print(counts)

# %% [markdown]
# `count_rows` drives the same two functions and leaves the model out. The passes are those of the
# longest answer; a row that has finished goes through all of them, since the batch has no other
# shape.
#
# ## What is wasted?
#
# Real requests differ more than these. Here are lengths from a log-normal distribution, as in the
# benchmarks: most are short, a few are long. **Predict first:** in batches of 16, which part of all
# rows is of use? What happens to it if requests with prompts of like length go together?

# %%
pairs = list(zip(*draw_lengths(256, PROMPT_LENGTHS, ANSWER_LENGTHS)))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
labels = []
for y, (size, order) in enumerate([(8, "as they come"), (16, "as they come"), (32, "as they come"),
                                   (16, "by prompt"), (16, "by answer")]):
    counts = count_batches(pairs, size, order)
    total, start = sum(counts[kind] for kind in KINDS), 0
    for kind, colour in KINDS.items():
        left.barh(y, 100 * counts[kind] / total, left=start, color=colour)
        start += 100 * counts[kind] / total
    labels.append(f"{size}, {order}")
    print(f"batches of {labels[-1]:17} {total:7} rows, "
          f"{100 * (counts['prompt'] + counts['answer']) / total:.0f} % of use")
left.set_yticks(range(len(labels)), labels)
left.invert_yaxis()
left.set_xlabel("% of the rows computed")
draw_one_batch(right, in_batches(pairs, 16, "as they come")[0])
plt.show()

# %% [markdown]
# Sorting by prompt helps against padding. Against rows that have finished only sorting by answer
# helps, and nobody knows how long an answer will be. A row is not a second, though: padding goes
# through in the prompts' pass, where arithmetic is what takes the time; a finished row rides along
# in passes that wait for the weights anyway, and what it costs is the seat in which another request
# could sit. Giving that seat away in the middle of the ride is chapter 10; the memory for it is
# chapter 09.
#
# ## The exercise
#
# Write `pad_batch`, `masked_attention_np` and `decode_batch` in `chapters/08_batching/exercise.py`.
# Then `python -m minillm grade 08` checks them, and
# `python -m minillm generate --impl chapters/08_batching/exercise.py --temperature 0 "Once upon a time"`
# writes text with them. In Python, `using` puts a function into the engine. Here it is one that
# only counts the rows:

# %%
rows_of_passes = []


def decode_and_watch(forward, logits, positions, pick):
    def watched(tokens, positions):
        rows_of_passes.append(len(tokens))
        return forward(tokens, positions)

    return decode_batch(watched, logits, positions, pick)


with using(decode_batch=decode_and_watch):
    answers = llm.generate(prompts, params)
print([output.text for output in answers])
print("rows of each pass:", rows_of_passes)

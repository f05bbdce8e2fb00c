# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Sampling
#
# **How is the next word chosen?**
#
# We look at what the model really says, cut and bend it with the usual knobs, draw from it by hand,
# and let it run into a loop. The chapter's text is `chapters/06_sampling/README.md`.

# %%
import inspect
import os
import time

import matplotlib.pyplot as plt
import numpy as np

from minillm import LLM, SamplingParams, sampling
from minillm.bench.draw import BLUE, GREEN, GREY, ORANGE, RED
from minillm.bench.sampling import repeated, softmax_entropy
from minillm.course import using
from minillm.loading.registry import fetch
from minillm.penalties import process_logits_np
from minillm.stopping import StopStrings

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy")

# %% [markdown]
# ## What the model says
#
# One row of logits for each token of the prompt; the last row is about what comes next.
# **Predict:** how sure is the model after "The capital of France is"? And after "My name is"?

# %%
contexts = ["The capital of France is", "My name is"]
rows = [llm.logits(llm.tokenizer.encode(context))[-1] for context in contexts]
print("a row:", rows[0].shape, rows[0].dtype)
for context, row in zip(contexts, rows):
    print(f"\n{context} ...   logits from {row.min():.1f} to {row.max():.1f}")
    for token in np.argsort(-row)[:5]:
        word, share = llm.tokenizer.decode([int(token)]), sampling.softmax_np(row)[token]
        print(f"  {word!r:14} logit {row[token]:6.2f}   probability {share:.3f}")

# %% [markdown]
# ## Temperature
#
# Dividing the logits by a temperature stretches or shrinks their differences before softmax.
# Below, all V tokens in order of their probability, on two logarithmic axes.
# **Predict:** which of the three lines falls fastest?

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, context, row in zip(axes, contexts, rows):
    for temperature, colour in ((0.5, BLUE), (1.0, GREEN), (2.0, ORANGE)):
        p = sampling.softmax_np(row / temperature)
        axis.loglog(np.arange(1, len(p) + 1), np.sort(p)[::-1], color=colour,
                    label=f"T={temperature}: {softmax_entropy(row / temperature):.1f} bits")
    axis.set(title=f"{context} ...", xlabel="rank of the token", ylim=(1e-12, 2))
    axis.legend(frameon=False)
axes[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# The far right is the tail. Each token there is next to impossible. **Predict:** how likely is it,
# at T=2, to draw *some* token that is not among the best thousand?

# %%
for context, row in zip(contexts, rows):
    for temperature in (0.5, 1.0, 2.0):
        p = np.sort(sampling.softmax_np(row / temperature))[::-1]
        print(f"{context:26} T={temperature}: {p[1000:].sum():7.2%} outside the best thousand")

# %% [markdown]
# ## Cutting the tail
#
# top_k, top_p and min_p each draw the line elsewhere; writing them is your exercise. Each takes
# logits and returns logits, with −∞ for what it removes, so they can stand one behind the other.

# %%
print(inspect.getsource(sampling.probabilities_np))

# %% [markdown]
# Over many places of *Macbeth*, one dot a place: how unsure the model is, and how many tokens each
# truncation leaves there. **Predict** the shape of each of the three clouds.

# %%
num_tokens = 96 if fast else 320
play = llm.tokenizer.encode(fetch("macbeth").read_text(encoding="utf-8")[:8000])[:num_tokens]
places = [row.astype(np.float64) for row in llm.logits(play)[32::2]]
bits = [softmax_entropy(row) for row in places]
counts = {
    "top_k=50": [np.isfinite(sampling.top_k_np(row, 50)).sum() for row in places],
    "top_p=0.9": [np.isfinite(sampling.top_p_np(row, 0.9)).sum() for row in places],
    "min_p=0.1": [np.isfinite(sampling.min_p_np(row, 0.1)).sum() for row in places],
}
fig, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (name, kept), colour in zip(counts.items(), (ORANGE, BLUE, GREEN)):
    axis.semilogy(bits, kept, ".", color=colour, label=name)
axis.set(xlabel="entropy of the next token (bits), T=1", ylabel="tokens let through")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Drawing with one number
#
# Lay the tokens along [0, 1) by their ids, each as long as it is likely; u is a place on that line.
# With an explicit u a test needs no luck: go over [0, 1) in equal steps, and every token must come
# as often as it is likely.

# %%
print(inspect.getsource(sampling.draw_np))
params = SamplingParams(temperature=1.0, top_k=6)
p = sampling.probabilities_np(rows[1], params)
tokens = [sampling.sample_np(rows[1], params, (i + 0.5) / 200) for i in range(200)]
ids = np.flatnonzero(p)
words = [repr(llm.tokenizer.decode([int(i)])) for i in ids]
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
axes[0].bar(range(len(ids)), np.cumsum(p[ids]), color=BLUE)
axes[0].axhline(0.62, color=RED, linestyle="--")
axes[0].text(-0.4, 0.9, "u = 0.62: the first bar\nthat is higher is drawn", color=RED)
axes[0].set(ylabel="running sum of probability", ylim=(0, 1.05))
axes[1].bar(np.arange(len(ids)) - 0.2, p[ids], 0.4, color=BLUE, label="probability")
axes[1].bar(np.arange(len(ids)) + 0.2, [tokens.count(int(i)) / len(tokens) for i in ids], 0.4,
            color=ORANGE, label="share of 200 draws, u evenly spaced")
axes[1].set(ylabel="share", ylim=(0, 1.6 * p.max()))
axes[1].legend(frameon=False)
for axis in axes:
    axis.set_xticks(range(len(ids)), words, rotation=30)
    axis.set_xlabel("token, in order of ids")
plt.show()

# %% [markdown]
# ## Why greedy text loops
#
# The best token every time, against drawing. We ask for the probability that the model gave to each
# token that was chosen (`logprobs=0`: of the chosen one alone).
# **Predict:** as a text begins to repeat itself, does the model get more sure or less?

# %%
prompt, length = "I think that", 24 if fast else 150
answers = {name: llm.generate([prompt], SamplingParams(
    max_tokens=length, ignore_eos=True, logprobs=0, **fields))[0] for name, fields in {
        "greedy": {"temperature": 0},
        "temperature 1": {"temperature": 1, "seed": 3},
        "greedy, penalty 1.2": {"temperature": 0, "repetition_penalty": 1.2}}.items()}
fig, axes = plt.subplots(3, 1, figsize=(9, 4.5), sharex=True, sharey=True, layout="constrained")
for axis, (name, answer) in zip(axes, answers.items()):
    chosen = [np.exp(entry[token]) for token, entry in zip(answer.token_ids, answer.logprobs)]
    axis.bar(range(len(chosen)), chosen, width=1, color=BLUE)
    axis.set_title(f"{name}: {repeated(answer.token_ids):.0%} of the runs of four tokens stood "
                   "there before", loc="left", fontsize=9)
    print(f"{name}: ... {' '.join(answer.text.split())[-160:]}\n")
axes[1].set_ylabel("probability of the token that was chosen")
axes[2].set_xlabel("token of the answer")
plt.show()

# %% [markdown]
# A loop is a trap that closes: what stands there twice is likely to come a third time. Drawing gets
# out by chance; the penalty makes what was there less likely, needed or not.
#
# ## The order of the steps
#
# The steps that can change which token is best come first, before the greedy choice. The steps you
# saw above never remove the best token, so greedy can do without them.

# %%
print(inspect.getsource(process_logits_np))

# %% [markdown]
# **Predict:** three tokens have the logits 3, 2 and 1; the output so far is token 0, twice. Which
# token does greedy take with a frequency penalty of 0.4, and which with 0.6?

# %%
for penalty in (0.4, 0.6):
    params = SamplingParams(temperature=0, frequency_penalty=penalty)
    token = sampling.sample_np(np.array([3.0, 2.0, 1.0]), params, 0.5, output_token_ids=[0, 0])
    print(f"frequency_penalty={penalty}: token {token}")

# %% [markdown]
# ## Seeds, and strings that stop
#
# A seed is where the stream of u's begins; every completion has a stream of its own.

# %%
params = SamplingParams(temperature=0.9, top_p=0.9, seed=7, n=2, max_tokens=12)
for _ in range(2):
    output = llm.generate(["The old lighthouse"], params)[0]
    print([completion.text for completion in output.outputs])

# %% [markdown]
# A stop string is text, and its characters may come in several tokens. What could be its beginning
# is held back. **Predict** what each call shows.

# %%
stop = StopStrings(("\nUser:",))
for piece in ["Good", " morning.", "\n", "Use", " it", " well", "\n", "User", ": and", " so on"]:
    if stop.found is None:
        print(f"in {piece!r:12} out {stop.feed(piece)!r:14} held back {stop.held!r}")
print("stopped at", repr(stop.found))

# %% [markdown]
# ## What the choice costs
#
# **Predict:** what share of a decode step goes into choosing the token?

# %%
ways = {"greedy": SamplingParams(temperature=0), "temperature": SamplingParams(temperature=0.8),
        "min_p": SamplingParams(temperature=0.8, min_p=0.1),
        "top_k": SamplingParams(temperature=0.8, top_k=50),
        "top_p": SamplingParams(temperature=0.8, top_p=0.9)}
times_ms = {name: [] for name in ways}
for _ in range(5 if fast else 20):
    for name, params in ways.items():
        start_s = time.perf_counter()
        sampling.sample_np(rows[1], params, 0.5)
        times_ms[name].append(1000 * (time.perf_counter() - start_s))
step_ms = answers["greedy"].metrics.tpot_ms
fig, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
axis.barh(list(ways), [np.median(times) for times in times_ms.values()], color=BLUE)
axis.axvline(step_ms, color=GREY, linestyle="--")
axis.text(step_ms * 0.95, 0, "a decode step", ha="right", color=GREY)
axis.set(xscale="log", xlabel="time of one choice (ms, median), NumPy, V = 49152")
axis.invert_yaxis()
plt.show()

# %% [markdown]
# ## Your turn
#
# Any function with the right signature can take a step's place in the engine. This one is *wrong*:
# it keeps every second token. **Predict** what the text looks like; then write the right ones in
# `chapters/06_sampling/exercise.py` and run `python -m minillm grade 06`.


# %%
def every_second_token(logits, k):
    return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)


with using(top_k_np=every_second_token) as plugged:
    params = SamplingParams(temperature=0.7, top_k=50, seed=1, max_tokens=12 if fast else 40)
    print(llm.generate(["Once upon a time"], params)[0].text)
print(plugged["top_k_np"].calls, "calls")

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
# # 01 · The first token
#
# **Where does the time go between a prompt and its answer?**
#
# We take one prompt by the hand and lead it through the model, piece by piece. Then we start the
# clock. The chapter's text is `chapters/01_first_token/README.md`.

# %%
import inspect
import os
import time

import matplotlib.pyplot as plt
import numpy as np

from minillm import LLM, SamplingParams
from minillm import generate as generate_module
from minillm.bench.draw import BLUE, ORANGE
from minillm.bench.first_token import use_log_ms
from minillm.course import using
from minillm.loading.registry import fetch
from minillm.metrics import request_metrics

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy", batching="none")
llm.config

# %% [markdown]
# ## Prompt → tokens
#
# The model reads integers. `encode` cuts the text into pieces that it knows, and gives their
# numbers. **Predict:** into how many pieces will this prompt be cut?

# %%
prompt = "The capital of France is"
prompt_token_ids = llm.tokenizer.encode(prompt)
for token in prompt_token_ids:
    print(f"{token:6}  {llm.tokenizer.decode([token])!r}")

# %% [markdown]
# ## Tokens → logits
#
# One forward pass over all of them: this is the **prefill**. The cache keeps what later tokens will
# need of these (chapter 07). We ask only for the scores that follow the last token, `rows=[-1]`.
#
# **Predict:** how many numbers come back?

# %%
cache = llm.runner.new_cache(64)
positions = list(range(len(prompt_token_ids)))
logits = llm.runner.forward(prompt_token_ids, positions, cache, rows=[-1])[0]
print("logits:", logits.shape, logits.dtype, "   cached tokens:", cache.length)
print(logits[:8])

# %% [markdown]
# One score for every token of the vocabulary, the impossible ones included. Softmax turns them into
# probabilities. **Predict** the model's favourite before you look.

# %%
probs = np.exp(logits - logits.max())
probs /= probs.sum()
best = np.argsort(-probs)[:10]
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.barh([repr(llm.tokenizer.decode([token])) for token in best], 100 * probs[best])
axis.invert_yaxis()
axis.set_xlabel("probability of being the next token (%)")
plt.show()

# %% [markdown]
# ## Logits → token → text, again and again
#
# We take the best (chapter 06 has better ideas), and feed it back: one token, one row. This is
# **decode**. The cache grows by one each time.

# %%
answer_token_ids = []
for _ in range(8):
    token = int(logits.argmax())
    answer_token_ids.append(token)
    print(f"cached {cache.length:2}  chosen {token:6}  "
          f"{prompt + llm.tokenizer.decode(answer_token_ids)!r}")
    logits = llm.runner.forward([token], [cache.length], cache, rows=[0])[0]

# %% [markdown]
# That is all that an inference engine does. In `minillm/generate.py` the two phases are two
# functions:

# %%
print(inspect.getsource(generate_module.prefill))
print(inspect.getsource(generate_module.decode))

# %% [markdown]
# ## Start the clock
#
# Now a longer prompt, the beginning of Macbeth, and a stopwatch at every stage.
#
# **Predict:** order these by time: encoding the text, the prefill, choosing a token, one decode
# step, decoding a token to text. How many decode steps does the prefill take?

# %%
num_prompt_tokens = 48 if fast else 256
text = fetch("macbeth").read_text(encoding="utf-8")
macbeth = llm.tokenizer.encode(text[:8000])
prompt_token_ids = macbeth[:num_prompt_tokens]
passage = llm.tokenizer.decode(prompt_token_ids)


def ask(model, token_ids, num_tokens):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return model.generate([token_ids], params)[0]


ask(llm, prompt_token_ids, 2)  # the first run sets things up, and would be blamed for it
cache = llm.runner.new_cache(num_prompt_tokens + 8)
stages, start_s = {}, time.perf_counter()


def lap(stage):
    global start_s
    stages[stage] = 1000 * (time.perf_counter() - start_s)
    start_s = time.perf_counter()


llm.tokenizer.encode(passage)
lap(f"encode {num_prompt_tokens} tokens")
logits = generate_module.prefill(llm.runner, prompt_token_ids, cache)
lap(f"prefill {num_prompt_tokens} tokens")
token = llm.runner.sample(logits, SamplingParams(temperature=0), 0.5, prompt_token_ids, [], ())
lap("choose a token")
llm.runner.forward([token], [cache.length], cache, rows=[0])
lap("one decode step")
llm.tokenizer.decode([token])
lap("decode it to text")

figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
bars = axis.barh(list(stages), list(stages.values()))
axis.bar_label(bars, [f" {ms:.0f}" if ms >= 10 else f" {ms:.2f}" for ms in stages.values()])
axis.invert_yaxis()
axis.set_xscale("log")
axis.margins(x=0.15)
axis.set_xlabel("time (ms, logarithmic)")
plt.show()

# %% [markdown]
# The forward passes are the time; all the rest is small change. So there are two waits to tell
# apart: the one before the first token, **TTFT**, and those between tokens, **ITL**, whose mean is
# **TPOT**. `request_metrics` makes them of the moments at which tokens came. What it promises is
# below; how it does it is your exercise, so its source is not shown here.

# %%
print(inspect.getdoc(request_metrics))

# %% [markdown]
# **Predict** with a pencil: a request is submitted at 50.0 s, and its tokens come at 50.25, 50.30,
# 50.35 and 50.50 s. TTFT, ITLs, TPOT, E2E?

# %%
request_metrics(50.0, [50.25, 50.30, 50.35, 50.50])

# %% [markdown]
# ## Every token of an answer, in both twins
#
# The same prompt for the NumPy engine and for the PyTorch engine, both in float32. Each dot is the
# wait for one token. **Predict:** where will the twins differ, in the first dot or in the others?

# %%
llm_torch = LLM("smollm2-135m-instruct", backend="torch", dtype="float32", batching="none")
torch_name = f"torch, {llm_torch.runner.device}"
twins = {"NumPy": llm, torch_name: llm_torch}
colours = {"NumPy": ORANGE, torch_name: BLUE}
num_output_tokens = 8 if fast else 64
ask(llm_torch, prompt_token_ids, 2)
outputs = {}
for name, model in twins.items():
    time.sleep(0.2)  # let the other library's threads go to sleep
    outputs[name] = ask(model, prompt_token_ids, num_output_tokens)

figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, (name, output) in zip(axes, outputs.items()):
    metrics = output.metrics
    waits_ms = [metrics.ttft_ms, *metrics.itl_ms]
    axis.plot(range(1, len(waits_ms) + 1), waits_ms, ".", color=colours[name])
    axis.axvspan(0, 1.5, color="grey", alpha=0.2)
    axis.axhline(metrics.tpot_ms, color="grey", linestyle="--")
    axis.set_title(f"{name}: TTFT {metrics.ttft_ms:.0f} ms, TPOT {metrics.tpot_ms:.1f} ms")
    use_log_ms(axis)
    axis.set_xlabel("token of the answer (grey: prefill; dashed: TPOT)")
axes[0].set_ylabel("ms since the token before")
plt.show()
print(outputs["NumPy"].text)

# %% [markdown]
# ## A mean hides a stall
#
# TPOT is one number for an answer. A reader notices the one gap that was ten times as long, and so
# ITLs are reported as percentiles: p99 is the gap that only one in a hundred exceeds.
#
# **Predict:** if one gap of 64 is ten times as long as the rest, what do p50, p99 and TPOT do?

# %%
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
for name, output in outputs.items():
    itl_ms = output.metrics.itl_ms
    p50, p95, p99 = np.percentile(itl_ms, (50, 95, 99))
    print(f"{name:12} TPOT {output.metrics.tpot_ms:6.1f}   ITL p50 {p50:6.1f}   p95 {p95:6.1f}   "
          f"p99 {p99:6.1f}   longest {max(itl_ms):6.1f} ms")
    axis.plot(np.sort(itl_ms), 100 * np.arange(1, len(itl_ms) + 1) / len(itl_ms), label=name,
              color=colours[name], drawstyle="steps-post")
stalled = [25.0] * 63 + [250.0]
print(f"one stall    TPOT {np.mean(stalled):6.1f}   ITL p50 {np.percentile(stalled, 50):6.1f}   "
      f"p95 {np.percentile(stalled, 95):6.1f}   p99 {np.percentile(stalled, 99):6.1f}   "
      f"longest {max(stalled):6.1f} ms")
axis.set_xlabel("inter-token latency (ms)")
axis.set_ylabel("gaps that are not longer (%)")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Which of the two grows with the prompt?
#
# **Predict:** the prompt gets twice as long. What happens to TTFT? What to TPOT?

# %%
lengths = [16, 32, 64] if fast else [32, 64, 128, 256, 512]
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for name, model in twins.items():
    time.sleep(0.2)
    measured = [ask(model, macbeth[:length], 4 if fast else 8).metrics for length in lengths]
    axes[0].plot(lengths, [metrics.ttft_ms for metrics in measured], "o-", label=name,
                 color=colours[name])
    axes[1].plot(lengths, [metrics.tpot_ms for metrics in measured], "o-", label=name,
                 color=colours[name])
for axis, title in zip(axes, ("TTFT", "TPOT")):
    axis.set_xscale("log", base=2)
    use_log_ms(axis)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("prompt length (tokens)")
    axis.set_title(title)
axes[0].set_ylabel("ms")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# A prefill has a row for each token of the prompt, a decode step always has one. That is why TTFT
# climbs and TPOT hardly moves. With it the whole wait can be foretold:
# `E2E = TTFT + (tokens − 1) · TPOT`. Where the two parts are equal, an answer turns from one that is
# mostly waited for into one that is mostly read.

# %%
for name, output in outputs.items():
    metrics = output.metrics
    decode_ms = (metrics.num_output_tokens - 1) * metrics.tpot_ms
    print(f"{name:12} E2E {metrics.e2e_ms:.0f} ms = prefill {metrics.ttft_ms:.0f} "
          f"+ decode {decode_ms:.0f};   "
          f"throughput {1000 * metrics.num_output_tokens / metrics.e2e_ms:.1f} tokens/s, "
          f"in decode {metrics.decode_tokens_per_s:.1f};   equal parts at "
          f"{1 + metrics.ttft_ms / metrics.tpot_ms:.0f} tokens")

# %% [markdown]
# ## Two prompts at once
#
# Both are submitted at the same moment, and this engine answers them one after the other (chapter
# 08 changes that). **Predict** the second one's TTFT, and its TPOT.

# %%
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
for output in llm.generate([macbeth[:32], macbeth[:32]], params):
    print(f"TTFT {output.metrics.ttft_ms:7.1f} ms   TPOT {output.metrics.tpot_ms:6.1f} ms   "
          f"E2E {output.metrics.e2e_ms:7.1f} ms")

# %% [markdown]
# The second one's wait in the queue is part of its TTFT: the clock starts when the request is made,
# not when somebody begins to work on it. That is what its sender feels.
#
# ## The exercise
#
# Write `request_metrics` in `chapters/01_first_token/exercise.py`, then
#
# ```
# python -m minillm grade 01
# python -m minillm generate --stats --impl chapters/01_first_token/exercise.py --temperature 0 "Once upon a time"
# ```
#
# `using` puts a function of yours into the engine. Here is one that is not finished: it counts, and
# measures nothing yet.


# %%
def my_request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    return f"{num_prompt_tokens} tokens in, {len(token_times_s)} out"


with using(request_metrics=my_request_metrics) as plugged:
    print(llm.generate(["Once upon a time"], params)[0].metrics)
print("calls:", plugged["request_metrics"].calls)

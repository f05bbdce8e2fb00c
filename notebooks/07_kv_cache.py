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
# # 07 · The KV cache
#
# Why not recompute?
#
# We let a real model write the same answer with and without a cache and count what it computes,
# look into the cache while it fills, measure what a token costs far into a text, and then use the
# cache for three things that it was not made for. The chapter's text is
# `chapters/07_kv_cache/README.md`.

# %%
import inspect
import os

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from minillm import LLM, SamplingParams
from minillm.bench.kv_cache import (
    BYTES_A_NUMBER, CACHES, COLOURS, LARGER_MODELS, ConcatenatedCache, answer, step, turn)
from minillm.course import using
from minillm.generate import generate, prefill
from minillm.kv_cache import KVCache
from minillm.request import Request

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy", batching="none")
runner, config = llm.runner, llm.config
(H, K, D), L = config.heads, config.num_hidden_layers
print(f"L = {L} layers, H = {H} query heads, K = {K} key/value heads, D = {D}")

# %% [markdown]
# ## How many rows go through the model?
#
# A *row* is one token on its way through all the layers. Without a cache, the whole text so far
# goes through for every new token. With one, only the token that was just written.
#
# **Predict first:** for an answer of 24 tokens to a prompt of about ten, how many rows is that
# with a cache, and how many without? Will the two answers be the same?

# %%
print(inspect.getsource(answer))
prompt_token_ids = llm.encode_prompt("The reason why the sky is blue is that")
num_tokens = 8 if fast else 24
answers = {name: answer(runner, name, prompt_token_ids, num_tokens)
           for name in ("recomputed", "preallocated")}
for name, each in answers.items():
    print(f"{name:13} {each['total_rows'][-1]:5} rows  {llm.tokenizer.decode(each['token_ids'])!r}")

# %% [markdown]
# The same tokens, from a fraction of the rows. With a prompt of T tokens and an answer of n it is
# `n·T + n(n − 1)/2` rows without a cache, and `T + n − 1` with it. Check the numbers above.

# %%
T = len(prompt_token_ids)
print(num_tokens * T + num_tokens * (num_tokens - 1) // 2, "and", T + num_tokens - 1)
for name, each in answers.items():
    plt.plot(range(1, num_tokens + 1), each["total_rows"], ".-", color=COLOURS[name], label=name)
plt.xlabel("tokens of the answer")
plt.ylabel("rows computed so far")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Why are old keys still right?
#
# **Predict first:** we read a text once to its fourth token, and once to its end. Is the key of the
# fourth token in the *last* layer, which has been through everything below, another one in the
# longer text?

# %%
short, long = (runner.new_cache(16) for _ in range(2))
prefill(runner, prompt_token_ids[:4], short)
prefill(runner, prompt_token_ids, long)
print("keys of all layers, [L, K, capacity, D]:", long.keys.shape)
print("tokens in it:", short.length, "and", long.length)
print("the key of token 3, last layer, head 0:", long.keys[-1, 0, 3, :5].round(3), "…")
difference = np.abs(short.keys[:, :, :4] - long.keys[:, :, :4]).max()
print(f"largest difference of the first four keys, in any layer: {difference:.1e}")

# %% [markdown]
# It is the same, up to the last digits of float32. The causal mask is the reason: a token never
# looks ahead, so nothing that comes later can change what it computed. In a model whose tokens see
# both ways there is no such thing as a KV cache. Queries are not kept: nobody asks for them twice.
#
# The cache is two arrays with free rows at the end. Here is one head of them; grey is not written.

# %%
picture = np.full((16, D), np.nan)
picture[: long.length] = long.keys[-1, 0, : long.length]
plt.figure(figsize=(7, 2.6))
plt.imshow(picture, aspect="auto", cmap="PuOr", vmin=-6, vmax=6)
plt.gca().set_facecolor("#cccccc")
plt.xlabel("entry of the key (0 … D − 1)")
plt.ylabel("position (token)")
plt.yticks(range(0, 16, 3))
plt.colorbar(label="value")
plt.title(f"keys of layer {L - 1}, head 0")
plt.show()

# %% [markdown]
# ## The code
#
# The model hands each layer's fresh q, k, v to `cache.attend` and knows nothing else about caches.

# %%
print(inspect.getsource(KVCache.append))
print(inspect.getsource(KVCache.attend))

# %% [markdown]
# ## What does it weigh?
#
# A token leaves a key and a value in each layer: `2·L·K·D` numbers. **Predict first:** how many
# tokens of cache weigh as much as this model's weights? And what would it be if each of the H
# query heads had keys of its own (K = H)?

# %%
layer_params = config.hidden_size * ((2 * H + 2 * K) * D + 3 * config.intermediate_size)
params = L * layer_params + config.vocab_size * config.hidden_size
print(f"{params / 1e6:.0f} million weights are as many numbers as {params // (2 * L * K * D)} "
      f"tokens of cache; with K = H, {params // (2 * L * H * D)} tokens")
for name, (layers, query_heads, kv_heads, head_dim) in LARGER_MODELS.items():
    shared, own = (2 * layers * heads * head_dim * BYTES_A_NUMBER / 1024
                   for heads in (kv_heads, query_heads))
    print(f"{name:14} {shared:5.0f} KiB a token ({own:.0f} if K were H): "
          f"{8192 * shared / 2**20:5.2f} GiB for 8192 tokens")

# %% [markdown]
# ## What does a token cost, far into a text?
#
# Three ways to come by the keys: `recomputed` (no cache), `concatenated` (a new array for every
# token, one row longer) and `preallocated` (ours). To get to a position without a long prefill, the
# caches are filled with random numbers: time does not depend on the values.
#
# **Predict first:** which of the three curves rise, and from where on does it hurt to copy the whole
# cache for every token?

# %%
print(inspect.getsource(ConcatenatedCache.append))
positions = (16, 64) if fast else (16, 64, 256, 1024, 4096)
tpot_ms = {name: {} for name in CACHES}
for position in positions:
    for name in CACHES:
        if name != "recomputed" or position <= 256:
            seconds_of_steps, rows = turn(runner, name, position)
            tpot_ms[name][position] = 1000 * np.median(seconds_of_steps)
    print(position, {name: f"{ms[position]:.0f} ms" for name, ms in tpot_ms.items()
                     if position in ms})
for name, by_position in tpot_ms.items():
    plt.plot(list(by_position), list(by_position.values()), "o-", color=COLOURS[name], label=name)
plt.xscale("log")
plt.yscale("log")
plt.xticks(positions, positions)
plt.gca().xaxis.set_minor_locator(NullLocator())
plt.gca().yaxis.set_major_formatter("{x:g}")
plt.gca().yaxis.set_minor_formatter("{x:g}")
plt.xlabel("position: tokens before this one")
plt.ylabel("time of one token, ms")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# One pass is no measurement: `python -m minillm bench kv_cache` does it in turns, several times, in
# NumPy and in torch, beside what the machine allows. The result is in the chapter.
#
# ## Use 1: a prompt in pieces
#
# If token by token is the same as all at once, so is any division between. `prefill` takes a long
# prompt in chunks, and the cache joins them: the scores of a chunk, [H, chunk, S], bound the memory.
# **Predict first:** do the logits depend on the chunk?

# %%
text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
long_prompt = llm.encode_prompt(text)[: 32 if fast else 96]
for chunk_size in (len(long_prompt), len(long_prompt) // 3, 7):
    cache = runner.new_cache(len(long_prompt))
    logits = prefill(runner, long_prompt, cache, chunk_size)
    print(f"chunks of {chunk_size:2}: best token {llm.tokenizer.decode([int(logits.argmax())])!r}, "
          f"its logit {logits.max():.4f}")

# %% [markdown]
# ## Use 2: taking tokens back
#
# `truncate` moves a counter and copies nothing. That makes guesses cheap: put several guessed tokens
# through the model in *one* pass, see how many it agrees with, forget the rest. This is speculative
# decoding (chapter 14), here with a guess that is good for three tokens and then goes wrong.

# %%
right = answers["preallocated"]["token_ids"]
guess = [*right[:3], *llm.encode_prompt(" banana bread")]
cache = runner.new_cache(64)
first_logits = prefill(runner, prompt_token_ids, cache)
positions = list(range(cache.length, cache.length + len(guess)))
logits = np.vstack([first_logits, runner.forward(guess, positions, cache)])
wanted = logits.argmax(axis=1)  # after the prompt, and after each guessed token
accepted = 0
while accepted < len(guess) and guess[accepted] == wanted[accepted]:
    accepted += 1
print("the cache holds", cache.length, "tokens, of which", accepted, "guesses are right")
cache.truncate(len(prompt_token_ids) + accepted)
continued, rows = step(runner, cache, [*prompt_token_ids, *right[: accepted + 1]])
print("truncated, and one more token:", repr(llm.tokenizer.decode([int(continued.argmax())])),
      "· without the detour:", repr(llm.tokenizer.decode([right[accepted + 1]])))

# %% [markdown]
# ## Use 3: a conversation
#
# The second question of a chat begins with everything that was said before. **Predict first:** how
# many tokens of the second prompt need to be computed?

# %%
params_of_answer = SamplingParams(temperature=0, max_tokens=4 if fast else 16)
cache, cached_token_ids, messages = runner.new_cache(256), [], []
for question in ("What is the capital of France?", "And of Italy?"):
    messages.append({"role": "user", "content": question})
    request = Request(llm.encode_chat(messages), params_of_answer, llm.stop_token_ids)
    # The last token of a prompt is always computed: the answer starts from its logits.
    same = os.path.commonprefix([cached_token_ids, request.prompt_token_ids[:-1]])
    cache.truncate(len(same))
    for _ in generate(runner, llm.tokenizer, request, cache):
        pass
    output = request.output
    cached_token_ids = [*output.prompt_token_ids, *output.token_ids][: cache.length]
    print(question, "·", output.text)
    print(f"   {output.metrics.num_cached_tokens} of {output.metrics.num_prompt_tokens} prompt "
          f"tokens were cached; first token after {output.metrics.ttft_ms:.0f} ms")
    messages.append({"role": "assistant", "content": output.text})
request = Request(llm.encode_chat(messages[:-1]), params_of_answer, llm.stop_token_ids)
for _ in generate(runner, llm.tokenizer, request, runner.new_cache(256)):
    pass
print(f"   the second prompt computed anew: first token after {request.output.metrics.ttft_ms:.0f} "
      f"ms; same answer: {request.output.text == output.text}")

# %% [markdown]
# Everything that both prompts begin with is kept, and the cache is truncated where they part. Only
# the new question and the template around it are computed. `llm.conversation()` and the command
# `chat` do the same with whole blocks of a cache that all requests share: that is chapter 09.

# %% [markdown]
# ## What a full cache must not do
#
# NumPy happily writes one row into an empty slice: nothing happens, and nobody is told. A cache that
# relies on it loses tokens at the end of its capacity, and the text turns strange without an error.

# %%
rows_of_a_full_array = np.zeros((K, 4, D))
rows_of_a_full_array[:, 4:5] = np.ones((K, 1, D))
print("written without a word; the array holds", rows_of_a_full_array.sum())
cache = KVCache(config, capacity=4)
one_token = np.ones((1, K, D), dtype=np.float32)
try:
    for number in range(5):
        cache.append(0, one_token, one_token)
except ValueError as error:
    print("ours:", error)

# %% [markdown]
# ## The exercise
#
# Write the class `KVCache` in `chapters/07_kv_cache/exercise.py`: `__init__`, `length`, `append`,
# `attend` and `truncate`. Then `python -m minillm grade 07` checks it, and
# `python -m minillm generate --impl chapters/07_kv_cache/exercise.py --temperature 0 "Once upon a time"` writes text
# with it. In Python, `using` puts a class into the engine. Here it is one that only watches:

# %%
class WatchedCache(KVCache):
    attended = []

    def attend(self, layer, q, k, v):
        self.attended.append((layer, len(q)))
        return super().attend(layer, q, k, v)


with using(KVCache=WatchedCache):
    text = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=8))[0].text
print(repr(text))
print("tokens a pass, seen by layer 0:", [n for layer, n in WatchedCache.attended if layer == 0])

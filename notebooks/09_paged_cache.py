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
# # 09 · The paged cache
#
# How do many lengths share one memory?
#
# We fill the same memory in three ways and count who has room, then look into the blocks of a real
# model: two prompts that begin alike, two answers to one prompt, a block that is copied before it
# is written to, and one that is forgotten. At the end we measure what a shared beginning saves. The
# chapter's text is `chapters/09_paged_cache/README.md`.

# %%
import inspect
import os

import numpy as np
from matplotlib import pyplot as plt

from minillm import LLM, SamplingParams
from minillm.bench.paged_cache import (
    ANSWER_LENGTHS, CONTEXT_LEN, MAX_TOKENS, PROMPT_LENGTHS, ContiguousMemory, count)
from minillm.bench.workload import draw_lengths
from minillm.block_manager import (
    ROOT_HASH, BlockManager, BlockTable, hash_block, match_prefix)
from minillm.course import using
from minillm.engine import Engine, EngineConfig
from minillm.generate import prefill
from minillm.paged_cache import paged_gather_np, paged_scatter_np
from minillm.request import Request

fast = os.environ.get("MINILLM_FAST") == "1"
llm = LLM("smollm2-135m-instruct", backend="numpy")
(H, K, D), L = llm.config.heads, llm.config.num_hidden_layers
print(f"L = {L} layers, K = {K} key/value heads, D = {D}: a token's keys and values are "
      f"{2 * L * K * D} numbers")

# %% [markdown]
# ## How many have room?
#
# A memory holds the keys and values of 8192 tokens: one context of this model. A queue of requests
# wants in. Most of them are short and a few are very long, and nobody knows how long an answer will
# be before it ends; it may have up to `max_tokens`.

# %%
prompts, answers = draw_lengths(64 if fast else 128, PROMPT_LENGTHS, ANSWER_LENGTHS, seed=1)
print("prompts:", prompts[:12], "…\nanswers:", answers[:12], "…")
plt.figure(figsize=(7, 2.2))
plt.hist([p + a for p, a in zip(prompts, answers)], bins=60, color="#0072B2")
plt.xlabel("tokens of a request in the end, prompt and answer")
plt.ylabel("requests")
plt.show()

# %% [markdown]
# **Predict first:** how many requests have room at the same time, on average, if each of them gets
# a place for the model's full context; if it gets its prompt plus `max_tokens`; if it gets blocks
# of 16 tokens, one after the other, as its text grows? And what part of the memory holds a token?

# %%
memories = {
    "full context": ContiguousMemory(CONTEXT_LEN, lambda sequence: CONTEXT_LEN),
    "prompt + max_tokens": ContiguousMemory(
        CONTEXT_LEN, lambda sequence: len(sequence.request.prompt_token_ids) + MAX_TOKENS),
    **{f"blocks of {size}": BlockManager(CONTEXT_LEN // size, size, enable_prefix_caching=False)
       for size in (16, 128)},
}
shares = {}
for name, memory in memories.items():
    counted = count(memory, list(zip(prompts, answers)))
    steps = counted["contended_steps"]  # those in which somebody had to wait for memory
    shares[name] = counted["held_tokens"] / (steps * CONTEXT_LEN)
    print(f"{name:20} {counted['running'] / steps:5.1f} at once; memory that holds a token: "
          f"{shares[name]:4.0%}; all are served after {counted['steps']} steps")
plt.figure(figsize=(7, 2))
plt.barh(list(shares), [100 * share for share in shares.values()],
         color=["#E69F00", "#E69F00", "#0072B2", "#0072B2"])
plt.gca().invert_yaxis()
plt.xlim(0, 100)
plt.xlabel("memory that holds a token, %")
plt.show()

# %% [markdown]
# What is reserved and not written is lost for everybody else. Blocks waste the rest of each
# sequence's last block and nothing more. (The scheduler keeps one block aside for each running
# sequence before it lets a new one in; with large blocks, that is felt.)
#
# ## A block table
#
# Position `p` of a sequence stands in block `p // block_size` of its table, at offset
# `p % block_size`. **Predict first:** blocks of 4, and a table that says 7, 2: in which rows of the
# memory, counted through all blocks, are the positions 2 to 5?

# %%
table = BlockTable(block_size=4)
table.block_ids += [7, 2]
print("slots of the positions 2 to 5:", table.slot_mapping(2, 6))
print("blocks missing for 9 tokens:", table.num_missing_blocks(9))
print(inspect.getsource(BlockTable.slot_mapping))
print(inspect.getsource(paged_scatter_np))
print(inspect.getsource(paged_gather_np))

# %% [markdown]
# ## Two prompts that begin alike
#
# An engine with a tiny memory of 24 blocks of 4 tokens. In the pictures a column is a block, and its
# number says in how many block tables it stands. A dot: nobody's any more, but its tokens are known
# and may come back. Empty: free.

# %%
engine = Engine(llm.runner, llm.tokenizer, EngineConfig(num_blocks=24, block_size=4))
blocks, cache = engine.scheduler.blocks, engine.cache


def ask(text, **params):
    """Give the engine a request;  -> its sequences, which the engine will change."""
    request = Request(llm.encode_prompt(text), SamplingParams(ignore_eos=True, **params), ())
    answers = engine.answers[engine.add_request(request)]
    return [answers[index].sequence for index in sorted(answers)]


def show(title, **sequences):
    """Block tables in numbers, and all blocks in colours."""
    for name, sequence in sequences.items():
        print(f"{name}: {sequence.num_computed_tokens:2} tokens computed, blocks "
              f"{sequence.block_table.block_ids}")
    plt.figure(figsize=(8, 0.5))
    plt.imshow([blocks.ref_counts], cmap="Blues", vmin=0, vmax=3, aspect="auto")
    for block_id in range(blocks.num_blocks):
        if block_id in blocks.evictable_block_ids:
            plt.text(block_id, 0, "•", ha="center", va="center", color="#666666")
        elif blocks.ref_counts[block_id]:
            plt.text(block_id, 0, blocks.ref_counts[block_id], ha="center", va="center")
    plt.xticks(range(blocks.num_blocks), fontsize=7)
    plt.yticks([])
    plt.title(title, fontsize=9)
    plt.show()


beginning = "The capital of France, as everybody knows, is Paris."
[first] = ask(f"{beginning} The capital of Italy is", max_tokens=6, temperature=0)
print("tokens of the prompt:", len(first.token_ids))
engine.step()
show("the first prompt is computed", first=first)

# %% [markdown]
# The second prompt begins with the same sentence and goes on otherwise. **Predict first:** how
# many of its tokens are computed, how many blocks does it take, and which ones change their colour?

# %%
[second] = ask(f"{beginning} What a city!", max_tokens=6, temperature=0)
shared = [a == b for a, b in zip(first.token_ids, second.token_ids)].index(False)
print(f"{len(second.token_ids)} tokens, of which the first {shared} are those of the first prompt")
engine.step()
print(f"found in the cache: {second.num_cached_tokens} tokens")
show("the second joins", first=first, second=second)

# %% [markdown]
# Only full blocks are shared: a block is found by the hash of its tokens, and half a block has none.
# What both see as their beginning lies in the memory once.
#
# Is it the same thing as the contiguous cache of chapter 07? **Predict first:** how far are the keys
# of the last layer, gathered from the blocks of `second`, from those of a cache in one piece?

# %%
print("pages of keys, [L, num_blocks, block_size, K, D]:", cache.keys.shape)
gathered = paged_gather_np(cache.keys[-1], np.array(second.block_table.block_ids))
print("gathered by the table, [W·block_size, K, D]:", gathered.shape)
alone = llm.runner.new_cache(32)
prefill(llm.runner, second.token_ids[: second.num_computed_tokens], alone)
in_one_piece = alone.keys[-1, :, : alone.length].swapaxes(0, 1)
print(f"largest difference: {np.abs(gathered[: alone.length] - in_one_piece).max():.1e}, where the "
      f"largest key is {np.abs(in_one_piece).max():.0f}")

# %% [markdown]
# ## Why the hash needs a parent
#
# A key depends on its position and, above the first layer, on all tokens before it. **Predict
# first:** the same four tokens stand first in one text and second in another. One block, or two?

# %%
tokens = first.token_ids[:4]
at_the_start = hash_block(ROOT_HASH, tokens)
behind_itself = hash_block(at_the_start, tokens)
print("first in a text:    ", at_the_start.hex()[:16], "…")
print("behind the same four:", behind_itself.hex()[:16], "…")
twice = llm.runner.new_cache(16)
prefill(llm.runner, tokens + tokens, twice)
print(f"and the keys of the last layer differ by up to "
      f"{np.abs(twice.keys[-1, :, :4] - twice.keys[-1, :, 4:8]).max():.1f}")
print(inspect.getsource(match_prefix))

# %% [markdown]
# ## Two answers to one prompt
#
# With `n=2` the prompt is computed once. Then both answers go on from the same blocks, the last of
# which is not full. **Predict first:** what happens when both want to write the next token into it?

# %%
while engine.answers:  # let the others end
    engine.step()
show("the first two have ended")
one, other = ask("Once upon a time, in a small village by the cold sea,", n=2, temperature=1.0, seed=4,
                 max_tokens=8)
print("tokens of the prompt:", len(one.token_ids))
engine.step()
show("the prompt is computed, and forked", one=one, other=other)
last = one.block_table.block_ids[-1]

# %%
engine.step()
show("one token later", one=one, other=other)
own, kept = one.block_table.block_ids[-1], other.block_table.block_ids[-1]
print(f"block {last} was copied to {own}: one answer has its own now, the other keeps {kept}")
for offset in range(one.num_computed_tokens % 4):  # those that are written
    same = np.array_equal(cache.keys[-1, own, offset], cache.keys[-1, kept, offset])
    print(f"   offset {offset}: {'the same key in both' if same else 'not the same key'}")

# %% [markdown]
# Copy on write: whoever is first to write takes a copy of the block that others hold as well. The
# second to come finds that nobody else holds the old block any more, and writes without a copy. The
# full blocks of the prompt stay shared to the end.

# %%
print(inspect.getsource(BlockManager.grow))

# %% [markdown]
# ## Forgetting
#
# Blocks whose sequences have ended keep their contents until somebody needs the room. **Predict
# first:** a long request comes and needs more blocks than are free. Of an older text's blocks, which
# should be given up first: the first of the text, or the last?

# %%
while engine.answers:
    engine.step()
show("everybody has ended")
print("next to be evicted, in this order:", list(blocks.evictable_block_ids))
print("blocks of the very first text that would be found again:",
      match_prefix(first.token_ids, 4, blocks.cached_blocks))
[long] = ask("A list of long words: " + "incomprehensibility, " * 12, max_tokens=2, temperature=0)
engine.step()
show("a long one has come", long=long)
print("blocks of the very first text that would be found again:",
      match_prefix(first.token_ids, 4, blocks.cached_blocks))
blocks.check_integrity([long])  # raises if a block is not free, referenced or cached, exactly once

# %% [markdown]
# The last: a block can be found through its parent alone, so a text whose beginning is gone is lost
# altogether, while one whose end is gone is still a good beginning. `release` therefore hands the
# blocks back from the end, and the least recently used goes first.
#
# ## What a shared beginning saves
#
# Some people ask about the same text, one after the other, each with a question of their own.
# **Predict first:** how long do the later ones wait for their first token, against the first one?

# %%
text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20
prefix = llm.encode_prompt(text)[: 48 if fast else 256]
questions = [llm.encode_prompt(f" Question {number}: what was it?") for number in range(6)]
ttft_ms = {}
for reuse in (True, False):
    config = EngineConfig(num_blocks=128, enable_prefix_caching=reuse)
    engine = Engine(llm.runner, llm.tokenizer, config)
    ttft_ms[reuse] = []
    for question in questions:
        request = Request(prefix + question, SamplingParams(max_tokens=1, temperature=0), ())
        engine.add_request(request)
        while engine.answers:
            engine.step()
        ttft_ms[reuse].append(request.output.metrics.ttft_ms)
    print("with reuse:   " if reuse else "without reuse:",
          " ".join(f"{ms:5.0f}" for ms in ttft_ms[reuse]), "ms")
for reuse, colour in ((True, "#0072B2"), (False, "#E69F00")):
    plt.plot(range(1, 7), ttft_ms[reuse], "o-", color=colour,
             label="prefix reused" if reuse else "computed anew")
plt.ylim(bottom=0)
plt.xlabel("request")
plt.ylabel("TTFT, ms")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# One pass is no measurement: `python -m minillm bench paged_cache` does it with 16 requests and 1000
# shared tokens, in turns, several times. The result is in the chapter. It is also what a stranger
# could see: who gets an answer unusually soon learns that somebody has sent the same beginning.
#
# ## The exercise
#
# Write `BlockTable`, `paged_gather_np` and `match_prefix` in `chapters/09_paged_cache/exercise.py`.
# Then `python -m minillm grade 09` checks them, and
# `python -m minillm generate --impl chapters/09_paged_cache/exercise.py --temperature 0 "Once upon a time"`
# writes text with them. In Python, `using` puts a function into the engine. Here it is one that
# finds nothing, ever. **Predict first:** what changes, the text or the work?

# %%
def finds_nothing(token_ids, block_size, cached_blocks):
    return []


params = SamplingParams(temperature=0, max_tokens=8)
prompt = "Once upon a time there was a girl who lived at the edge of a deep, dark forest, and"
for name, function in (("match_prefix", match_prefix), ("finds_nothing", finds_nothing)):
    with using(match_prefix=function):
        outputs = [llm.generate(prompt, params)[0] for _ in range(2)]
    print(f"{name:13} {outputs[1].metrics.num_cached_tokens:2} of "
          f"{outputs[1].metrics.num_prompt_tokens} tokens found; {outputs[1].text!r}")

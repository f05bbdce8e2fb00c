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
# # 10 · Continuous batching
#
# Who goes next?
#
# We fill steps by hand first, with requests that are nothing but numbers: who waits, who runs, who
# has to go. Then the same function drives the real model, one step at a time, and we draw what it
# does: prompts in pieces, requests that join and leave, one that is preempted. At last a long
# prompt comes in while others are being answered. The chapter's text is
# `chapters/10_continuous_batching/README.md`.

# %%
import inspect
import os
import time

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from minillm import LLM, SamplingParams
from minillm.block_manager import BlockManager
from minillm.course import using
from minillm.engine import Engine, EngineConfig
from minillm.metrics import percentiles
from minillm.request import Request
from minillm.scheduler import Scheduler, schedule
from minillm.sequence import Sequence

fast = os.environ.get("MINILLM_FAST") == "1"
BLUE, ORANGE, RED, GREY = "#0072b2", "#e69f00", "#d55e00", "#bbbbbb"

# %% [markdown]
# ## Four lines, and one decision
#
# This is the whole engine, without its cellar. Each turn of it is one *step*: one pass through the
# model.

# %%
print(inspect.getsource(Engine.step))

# %% [markdown]
# And this is the decision. It knows no tensors. What it shares out is a budget of tokens, and what
# it asks is: are there blocks?

# %%
print(inspect.getsource(schedule))

# %% [markdown]
# ## A toy: three requests, two seats
#
# No model is needed to watch it. A sequence gets a made-up token whenever one would be sampled.
# In the table a number is so many tokens of a prompt, `•` one token of an answer, `.` waiting, and
# `!` stands where a sequence lost its blocks.
#
# **Predict first:** A and B have prompts of 2 tokens and want 7 and 3 tokens; C's prompt has 9, and
# it wants 3. With two seats and all the budget in the world, when does C get its first token? In
# which step does A's reader wait longest?

# %%
LENGTHS = {"A": (2, 7), "B": (2, 3), "C": (9, 3)}  # tokens of prompt and answer


def toy_sequence(number, num_prompt_tokens, num_answer_tokens, block_size):
    """Token ids that nobody else has, so that no prefix is shared."""
    first = 1000 * (number + 1)
    request = Request(list(range(first, first + num_prompt_tokens)),
                      SamplingParams(max_tokens=num_answer_tokens), ())
    return Sequence(request, request.output.outputs[0], number, block_size)


def play(lengths, seats, budget, num_blocks=100, block_size=4):
    """Run the scheduler to the end of all requests, and print who computed what."""
    scheduler = Scheduler(BlockManager(num_blocks, block_size), seats, budget)
    sequences = {name: toy_sequence(number, *each, block_size)
                 for number, (name, each) in enumerate(lengths.items())}
    for sequence in sequences.values():
        scheduler.add(sequence)
    cells, num_rows = {name: [] for name in lengths}, []
    while scheduler.waiting or scheduler.running:
        preempted_before = {name: each.num_preemptions for name, each in sequences.items()}
        batch = scheduler.schedule()
        in_step = {id(sequence): num_tokens for sequence, num_tokens in batch.scheduled}
        for name, sequence in sequences.items():
            num_tokens = in_step.get(id(sequence), 0)
            mark = "•" if num_tokens and sequence.is_decoding else str(num_tokens or ".")
            if sequence.num_preemptions > preempted_before[name]:
                mark = "!"
            cells[name].append(mark if sequence in scheduler.waiting + scheduler.running else " ")
        num_rows.append(len(batch.tokens))
        scheduler.update(batch)
        for sequence in batch.sampling:
            sequence.token_ids.append(0)
            num_prompt_tokens = len(sequence.request.prompt_token_ids)
            if len(sequence.token_ids) - num_prompt_tokens == sequence.request.params.max_tokens:
                scheduler.remove(sequence)
    for name, marks in {"step": range(1, len(num_rows) + 1), **cells, "rows": num_rows}.items():
        print(f"{name:5}" + "".join(f"{mark!s:>3}" for mark in marks))


play(LENGTHS, seats=2, budget=100)

# %% [markdown]
# C takes B's seat in the very next step: that is *in-flight* batching. But look at the row of rows.
# Where C's prompt comes in, A's next token is one of ten rows, and comes when all ten are done. Now
# with a budget of four:

# %%
play(LENGTHS, seats=2, budget=4)

# %% [markdown]
# No step has more than four rows. A keeps its pace, and C pays with two steps. And this is what a
# *static* batch is in the same language: nobody gets in while anybody runs. (Chapter 08's batch
# also goes on computing rows that have finished; here their seats just stay empty.)

# %%
def schedule_static(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    seats = 0 if running else max_num_seqs  # for newcomers
    return schedule(waiting, running, blocks, seats, max_num_batched_tokens)


with using(schedule=schedule_static):
    play(LENGTHS, seats=2, budget=100)

# %% [markdown]
# ## Out of blocks
#
# Now memory is short: seven blocks of four tokens. D, E and F have prompts of 6 tokens, two blocks
# each, and want 12 tokens, so each of them will need five blocks in the end.
#
# **Predict first:** three blocks are left when D and E run, and a seat. Does F get in? And who goes
# when the blocks run out?

# %%
play({"D": (6, 12), "E": (6, 12), "F": (6, 12)}, seats=3, budget=20, num_blocks=7)

# %% [markdown]
# F needs two blocks, and D and E will want one each soon: it stays outside, which is the rule of
# the *spare blocks*. Later D and E run into the wall all the same, and E, who came later, goes
# (`!`). It returns when D has ended, in front of F, and the number there is what has to be computed
# again: its prompt and all of its answer so far, but for those blocks that nobody had needed
# meanwhile, which still hold what was in them. F comes in beside it, and meets the same fate: the
# youngest goes.
#
# ## The real engine, one step at a time
#
# Now with the model. Six requests come before certain steps, into an engine with five seats and 24
# tokens a step. We call `Engine.step()` ourselves and note `StepOutput.scheduled`: the request, the
# index of its completion, how many tokens, and whether they are of a prompt.
#
# **Predict first:** two requests will have to wait, one for a seat and one for another reason.
# Which?

# %%
llm = LLM("smollm2-135m-instruct", dtype="float32")
llm.generate("This is to warm up. " * 8, SamplingParams(max_tokens=2, logprobs=2))  # what is done once
TEXTS = (
    "Once upon a time",
    "The three most important things to know about the sea are these. First, it is deep. "
    "Second, it",
    "My favourite food is",
    "Here is a letter to my landlord. Dear Sir, I have lived in your house for seven years now, "
    "and in all that time I have never complained. But last night, when I came home and opened "
    "the door to the kitchen, I found that",
    "The sky is",
    "A list of animals: the cat, the dog, the",
)
NUM_TOKENS = (8, 6, 4, 6, 4, 5) if fast else (36, 20, 10, 24, 8, 16)
ARRIVAL_STEPS = (0, 0, 2, 4, 5, 7)


def new_requests():
    """Greedy, and with the two best tokens' logprobs, for later."""
    return [Request(llm.encode_prompt(text), SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2), llm.stop_token_ids)
        for text, num_tokens in zip(TEXTS, NUM_TOKENS)]


def drive(engine, requests, arrival_steps):
    """-> for every step: (start, end, StepOutput.scheduled, who waits, who was just preempted)."""
    steps, number, sequences, start_s = [], 0, {}, time.perf_counter()
    while number < len(requests) or engine.answers:
        while number < len(requests) and arrival_steps[number] <= len(steps):
            request_id = engine.add_request(requests[number])
            sequences[request_id] = engine.answers[request_id][0].sequence
            number += 1
        before = {key: each.num_preemptions for key, each in sequences.items()}
        begin_s = time.perf_counter()
        scheduled = engine.step().scheduled
        steps.append((begin_s - start_s, time.perf_counter() - start_s, scheduled,
                      [sequence.order[0] for sequence in engine.scheduler.waiting],
                      [key for key, each in sequences.items()
                       if each.num_preemptions > before[key]]))
    return steps


config = dict(max_num_seqs=5, max_num_batched_tokens=24, block_size=4)
engine, requests = Engine(llm.runner, llm.tokenizer, EngineConfig(**config)), new_requests()
print("prompts of", [len(request.prompt_token_ids) for request in requests], "tokens, answers of",
      list(NUM_TOKENS))
steps = drive(engine, requests, ARRIVAL_STEPS)
for number, (start_s, end_s, scheduled, waiting, _) in enumerate(steps[:12]):
    parts = ", ".join(f"{request}: {num_tokens}{' of its prompt' if is_prefill else ''}"
                      for request, _, num_tokens, is_prefill in scheduled)
    print(f"step {number:2} {1000 * (end_s - start_s):4.0f} ms  {parts}   waiting {waiting}")

# %% [markdown]
# Add the numbers of a step up: never more than 24. Where a request waits although a seat is free,
# the budget is used up by those before it. Here is all of it as a picture; time goes to the right,
# and a step is as wide as it was long.

# %%
def draw_steps(steps, num_requests, title):
    figure, axis = plt.subplots(figsize=(9, 3.4))
    for start_s, end_s, scheduled, waiting, preempted in steps:
        for request, _, num_tokens, is_prefill in scheduled:
            axis.barh(request, end_s - start_s, left=start_s, height=0.8 if is_prefill else 0.4,
                      color=ORANGE if is_prefill else BLUE, edgecolor="white", linewidth=0.4)
            if is_prefill:
                axis.text((start_s + end_s) / 2, request, num_tokens, ha="center", va="center",
                          fontsize=7)
        for request in waiting:
            axis.plot([start_s, end_s], [request, request], color=GREY, linewidth=1.5)
        for request in preempted:
            axis.plot(start_s, request, "X", color=RED, markersize=9, markeredgecolor="white")
    axis.set_yticks(range(num_requests), [f"request {number}" for number in range(num_requests)])
    axis.invert_yaxis()
    axis.set_xlabel("seconds · orange: a piece of a prompt, and its tokens; blue: a token of an "
                    "answer; grey: waiting; ✕: preempted")
    axis.xaxis.label.set_size(8)
    axis.set_title(title)
    plt.show()


draw_steps(steps, len(requests), "five seats, 24 tokens a step")

# %% [markdown]
# See how the long prompt of request 3 is cut, and how the steps with its pieces hold blue tokens of
# the others; how a request begins in the step after another has ended; and that the grey lines end
# in the order in which they began.
#
# ## The same, with hardly any memory
#
# **Predict first:** so few blocks that they run out. Will the texts be the same?

# %%
num_blocks = max(-(-(len(request.prompt_token_ids) + num_tokens) // config["block_size"])
                 for request, num_tokens in zip(requests, NUM_TOKENS)) + 1
cramped = Engine(llm.runner, llm.tokenizer, EngineConfig(**config, num_blocks=num_blocks))
again = new_requests()
steps_cramped = drive(cramped, again, ARRIVAL_STEPS)
draw_steps(steps_cramped, len(again),
           f"the same, with {num_blocks} blocks of {config['block_size']} tokens")
print(f"{len(steps)} steps with all the memory, {len(steps_cramped)} with {num_blocks} blocks,",
      sum(len(preempted) for *_, preempted in steps_cramped), "preemptions")
print("most requests in one step:", max(len(scheduled) for _, _, scheduled, *_ in steps), "and",
      max(len(scheduled) for _, _, scheduled, *_ in steps_cramped))

# %% [markdown]
# Less memory is less company: fewer requests run side by side, and it takes more steps. The orange
# that follows a ✕ is what was computed again.
#
# ## The same tokens?
#
# We have each request twice now, in two different kinds of company. Once more, quite alone:

# %%
alone = new_requests()
for request in alone:
    drive(Engine(llm.runner, llm.tokenizer, EngineConfig(**config)), [request], [0])
for number, versions in enumerate(zip(alone, requests, again)):
    token_ids = [request.output.token_ids for request in versions]
    same = "the same three times" if token_ids[0] == token_ids[1] == token_ids[2] else "DIFFERENT"
    print(f"{number} {same}: {versions[0].output.text[:60]!r}")

# %% [markdown]
# And yet the numbers below the tokens are *not* quite the same. A matrix product of 24 rows is
# summed in another order than one of a single row. How far apart are the logarithms of the
# probabilities, and how far the best token from the second best?

# %%
differences, gaps = [], []
for first, second in zip(alone, requests):
    for one, other in zip(first.output.logprobs, second.output.logprobs):
        if list(one)[:2] != list(other)[:2]:
            break  # from here on the texts could part
        differences += [abs(one[token] - other[token]) for token in list(one)[:2]]
        best, second_best = sorted(one.values(), reverse=True)[:2]
        gaps.append(best - second_best)
print(f"largest difference: {max(differences):.1e}; smallest gap of the two best: {min(gaps):.1e}, "
      f"of {len(gaps)} tokens")

# %% [markdown]
# As long as the gap is the larger of the two, greedy texts do not depend on the company. It will
# not always be: among many thousands of tokens there is a closer call. In float64 the difference is
# some nine digits smaller, and that is how the tests of the engine compare.
#
# ## A long prompt comes in
#
# Three requests are being read. Then somebody sends a long prompt. **Predict first:** what do the
# three see if it goes through in one step, and what if no step may have more than 64 tokens? Who
# pays?

# %%
long_tokens = 64 if fast else 900
long_prompt = llm.encode_prompt("It was the best of times, it was the worst of times. " * 80)
budgets = (1024, 16 if fast else 64)


def interrupted(budget):
    """-> a reader's gaps between tokens in ms, when each ended in s, the newcomer's TTFT in ms."""
    engine = Engine(llm.runner, llm.tokenizer, EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=budget, enable_prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    readers = [engine.add_request(Request(llm.encode_prompt(text), params, ()))
               for text in TEXTS[:3]]
    for _ in range(8):
        engine.step()
    newcomer = Request(long_prompt[:long_tokens], SamplingParams(temperature=0, max_tokens=6,
                                                                 ignore_eos=True), ())
    newcomer_id = engine.add_request(newcomer)
    while engine.is_unfinished(newcomer_id):
        engine.step()
    times_s = np.array(engine.answers[readers[0]][0].token_times_s)
    for reader in readers:
        engine.abort(reader)
    ends_s = times_s[1:] - newcomer.submitted_s
    return 1000 * np.diff(times_s), ends_s, newcomer.output.metrics.ttft_ms


for budget, colour in zip(budgets, (RED, BLUE)):
    gaps_ms, ends_s, ttft_ms = interrupted(budget)
    print(f"at most {budget:4} tokens a step: the reader's longest gap {gaps_ms.max():5.0f} ms, "
          f"{np.median(gaps_ms[ends_s <= 0]):3.0f} before; the newcomer's first token after "
          f"{ttft_ms:.0f} ms")
    plt.plot(ends_s, gaps_ms, "o-", drawstyle="steps-pre", markersize=3, color=colour,
             label=f"{budget} tokens a step")
plt.axvline(0, color=GREY)
plt.xlabel("seconds after the long prompt came")
plt.ylabel("a reader's gap before each token, ms")
plt.yscale("log")
plt.gca().yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
plt.gca().yaxis.set_major_formatter("{x:g}")
plt.gca().yaxis.set_minor_formatter(NullFormatter())
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# One long silence, or a number of short ones. The newcomer pays with its TTFT: each piece reads all
# the weights again, and looks back at all that came before it. One run is no measurement: `python
# -m minillm bench load` does it in turns, for several budgets, with a prompt of 4000 tokens.
#
# ## What a queue does
#
# At last a whole load, in *virtual* time: the real scheduler, a made-up machine on which a step
# takes 20 ms and 1 ms more for each row. Requests come as a Poisson process, at a rate that we
# choose; the clock of each starts when it comes, also if nobody looks. **Predict first:** the rate
# doubles, and doubles again. Does TTFT double too?

# %%
def simulate(rate, num_requests, seats=16, budget=128):
    """-> TTFT of every request in ms; it comes from arrivals at `rate` requests a second."""
    rng = np.random.default_rng(0)
    arrivals_s = np.cumsum(rng.exponential(1 / rate, num_requests))
    lengths = np.rint(np.exp(rng.normal(3.3, 1.0, (num_requests, 2)))).clip(2, 400).astype(int)
    scheduler = Scheduler(BlockManager(4000, 16, enable_prefix_caching=False), seats, budget)
    now_s, number, ttft_ms = 0.0, 0, {}
    while number < num_requests or scheduler.waiting or scheduler.running:
        while number < num_requests and arrivals_s[number] <= now_s:
            scheduler.add(toy_sequence(number, *lengths[number].tolist(), 16))
            number += 1
        if not (scheduler.waiting or scheduler.running):
            now_s = arrivals_s[number]
            continue
        batch = scheduler.schedule()
        now_s += 0.020 + 0.001 * len(batch.tokens)
        scheduler.update(batch)
        for sequence in batch.sampling:
            sequence.token_ids.append(0)
            who, num_prompt_tokens = sequence.order[0], len(sequence.request.prompt_token_ids)
            ttft_ms.setdefault(who, 1000 * (now_s - arrivals_s[who]))
            if len(sequence.token_ids) - num_prompt_tokens == sequence.request.params.max_tokens:
                scheduler.remove(sequence)
    return list(ttft_ms.values())


rates = (2, 4) if fast else (1, 2, 4, 6, 8, 9, 10, 12)
for name, rule, colour in (("static", schedule_static, RED), ("in flight", schedule, BLUE)):
    with using(schedule=rule):
        found = [percentiles(simulate(rate, 20 if fast else 200)) for rate in rates]
    for percent, style in ((50, "-"), (95, "--")):
        plt.plot(rates, [each[percent] for each in found], style, marker="o", markersize=3,
                 color=colour, label=f"{name}, p{percent}")
plt.xlabel("requests a second")
plt.ylabel("TTFT, ms (virtual)")
plt.yscale("log")
plt.gca().yaxis.set_major_formatter("{x:g}")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# It does not. While there are free seats, hardly anybody waits; close to the machine's limit bursts
# queue up, p95 first; beyond it the line grows for as long as the load lasts, and only the length
# of our experiment keeps the numbers finite. The static rule breaks much earlier, on the same
# machine with the same seats: its seats stand empty while the longest answer of the batch goes on.
#
# ## The exercise
#
# Write `schedule` in `chapters/10_continuous_batching/exercise.py`. Then
# `python -m minillm grade 10` checks it, and
# `python -m minillm generate --impl chapters/10_continuous_batching/exercise.py --temperature 0 "Once upon a time"`
# writes text with it. In Python, `using` puts a function into the engine, as we did above with the
# static rule. Here it is one that only watches:

# %%
seen = []


def schedule_watched(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    scheduled = schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens)
    seen.append([num_tokens for _, num_tokens in scheduled])
    return scheduled


with using(schedule=schedule_watched):
    outputs = llm.generate(list(TEXTS[:3]), SamplingParams(temperature=0, max_tokens=8))
for output in outputs:
    print(repr(output.text))
print("tokens of each request in each step:", seen)

"""Why does a second request cost almost nothing? The static, padded batch.

One pass through the weights serves B sequences as well as one, as long as reading the weights is
what takes the time. The simplest way to get there: pad all prompts to one length, take them through
the model together, and go on until the last one has finished. Chapter 08_batching tells the story,
and counts what is wasted: padding is computed like tokens, and a row that has finished costs as
much as one that has not. Left out: rows that join and leave, which is the engine's subject.

Padding stands on the left, so that all prompts end, and all answers begin, in the same column.
"""

from __future__ import annotations

import time

import lazy_loader as lazy
import numpy as np

from .attention import masked_attention_np, masked_attention_sdpa
from .exercise import exercise
from .generate import PREFILL_CHUNK, CompletionWriter
from .metrics import request_metrics
from .sampling import request_rng

torch = lazy.load("torch")


@exercise("08_batching", order=1)
def pad_batch(prompts, pad_token_id=0):
    """Prompts of several lengths as one rectangle, filled up on the left.

    prompts: B lists of token ids, none empty
    -> tokens [B, T], positions [B, T], num_padding [B]: arrays of int. T is the longest prompt's
    length. A prompt's own tokens stand at the end of its row and have the positions 0, 1, 2 …, as
    they would alone; padding is pad_token_id at position 0, and num_padding counts it, row by row.

    >>> pad_batch([[7, 8, 9], [5]])[1]
    array([[0, 1, 2],
           [0, 0, 0]])
    """
    T = max(map(len, prompts))
    tokens = np.full((len(prompts), T), pad_token_id, dtype=np.int64)
    num_padding = np.array([T - len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts):
        row[T - len(prompt):] = prompt
    positions = np.maximum(np.arange(T) - num_padding[:, None], 0)
    return tokens, positions, num_padding


def padded_mask_np(num_padding, T, S):
    """Who sees whom, when every sequence's padding stands in front of it.

    num_padding: [B]; the T queries are the last T of the S columns  ->  visible [B, T, S] bool
    A query sees the columns from its sequence's first token up to its own. A query that is padding
    sees itself: its output is read by nobody, but a softmax over nothing would be NaN.
    """
    key = np.arange(S)
    query = np.arange(S - T, S)[:, None]  # [T, 1]
    first = num_padding[:, None, None]  # [B, 1, 1]
    return ((key <= query) & (key >= first)) | (key == query)


def padded_mask_torch(num_padding, T, S):
    """Same contract as padded_mask_np."""
    key = torch.arange(S, device=num_padding.device)
    query = torch.arange(S - T, S, device=num_padding.device)[:, None]
    first = num_padding[:, None, None]
    return ((key <= query) & (key >= first)) | (key == query)


class PaddedCache:
    """The keys and values of B sequences side by side, padding included (NumPy).

    num_padding: [B], as pad_batch counts it   capacity: columns that it holds, prompt and answer
    keys, values: [L, B, K, capacity, D].   Memory: every sequence takes what the longest one takes.

    attend: rows come sequence by sequence, the same number T from each: q is [B·T, H, D].
    """

    def __init__(self, config, num_padding, capacity, dtype=np.float32):
        self.num_padding, self.capacity = num_padding, capacity
        self.lengths = [0] * config.num_hidden_layers
        shape = (config.num_hidden_layers, len(num_padding), config.num_key_value_heads, capacity,
                 config.head_dim)
        self.keys, self.values = np.empty(shape, dtype), np.empty(shape, dtype)

    def append(self, layer, k, v):
        """k, v: [B, K, T, D], written behind what the layer holds;  -> all of it [B, K, S, D]."""
        start = self.lengths[layer]
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} columns do not fit in a cache of {self.capacity}")
        self.keys[layer, :, :, start:end], self.values[layer, :, :, start:end] = k, v
        self.lengths[layer] = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(self, layer, q, k, v):
        """Store fresh keys and values, then attend.   q: [B·T, H, D], k, v: [B·T, K, D]."""
        q, k, v = (each.reshape(len(self.num_padding), -1, *each.shape[1:]).swapaxes(1, 2)
                   for each in (q, k, v))  # [B, heads, T, D]
        keys, values = self.append(layer, k, v)
        visible = padded_mask_np(self.num_padding, q.shape[2], keys.shape[2])
        out = masked_attention_np(q, keys, values, visible)
        return out.swapaxes(1, 2).reshape(-1, *out.shape[1::2])  # [B·T, H, D]


class PaddedCacheTorch(PaddedCache):
    """Same contract as PaddedCache; tensors on `device`."""

    def __init__(self, config, num_padding, capacity, dtype, device):
        self.num_padding, self.capacity = torch.from_numpy(num_padding).to(device), capacity
        self.lengths = [0] * config.num_hidden_layers
        shape = (config.num_hidden_layers, len(num_padding), config.num_key_value_heads, capacity,
                 config.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))

    def attend(self, layer, q, k, v):
        """Same contract as PaddedCache.attend."""
        q, k, v = (each.reshape(len(self.num_padding), -1, *each.shape[1:]).swapaxes(1, 2)
                   for each in (q, k, v))
        keys, values = self.append(layer, k, v)
        visible = padded_mask_torch(self.num_padding, q.shape[2], keys.shape[2])
        out = masked_attention_sdpa(q, keys, values, visible)
        return out.swapaxes(1, 2).reshape(-1, *out.shape[1::2])


@exercise("08_batching", order=3)
def decode_batch(forward, logits, positions, pick):
    """Sample a token for every row, feed all of them back, until the last row has finished.

    forward(tokens, positions): one pass; takes a token and a position for every row, two lists of
        B ints   ->  logits [B, V]
    logits: [B, V], of the last prompt tokens   positions: B ints, where the rows' next tokens stand
    pick(row, logits[row])  ->  (token, has_finished); to be called once for every token of a row,
        rows in order, and never again after it has finished.
    -> the number of calls of forward: 0 if every row has finished with its first token.

    The batch keeps its shape: a row that has finished is computed like the others (its last token
    again, at its next position), and nobody reads what comes of it.
    """
    tokens, positions, num_steps = [0] * len(positions), list(positions), 0
    has_finished = [False] * len(positions)
    while True:
        for row in range(len(tokens)):
            if not has_finished[row]:
                tokens[row], has_finished[row] = pick(row, logits[row])
        if all(has_finished):
            return num_steps
        logits = forward(tokens, positions)
        positions = [position + 1 for position in positions]
        num_steps += 1


def generate_static(runner, tokenizer, requests):
    """Answer requests in one static batch, all their completions side by side; `request.output` is
    filled in. Returns when the last one has finished."""
    rows = [(request, completion) for request in requests for completion in request.output.outputs]
    tokens, positions, num_padding = pad_batch([request.prompt_token_ids for request, _ in rows])
    (B, T), context_len = tokens.shape, runner.weights.config.max_position_embeddings
    writers = [CompletionWriter(completion, tokenizer, request, context_len)
               for request, completion in rows]
    cache = runner.new_padded_cache(num_padding, T + max(each.max_tokens for each in writers))
    rngs = [request_rng(request.params.seed, completion.index) for request, completion in rows]
    token_times_s = [[] for _ in rows]

    def pick(row, logits):
        (request, completion), logits = rows[row], logits[: tokenizer.vocab_size]
        token = runner.sample(logits, request.params, rngs[row].random(), request.prompt_token_ids,
                              completion.token_ids, request.stop_token_ids)
        token_times_s[row].append(time.perf_counter())
        if completion.logprobs is not None:
            completion.logprobs.append(runner.top_logprobs(logits, token, request.params.logprobs))
        writers[row].add(token)
        return token, completion.finish_reason is not None

    width = max(1, PREFILL_CHUNK // B)  # columns a pass; every prompt ends in the last one
    next_positions = [len(request.prompt_token_ids) for request, _ in rows]
    try:
        for start in range(0, T, width):
            chunk, num = slice(start, start + width), min(width, T - start)
            last_rows = list(range(num - 1, B * num, num)) if start + num == T else []
            logits = runner.forward(tokens[:, chunk].ravel(), positions[:, chunk].ravel(), cache,
                                    last_rows)
        decode_batch(lambda tokens, positions: runner.forward(tokens, positions, cache), logits,
                     next_positions, pick)
    finally:
        for (request, completion), times_s in zip(rows, token_times_s):
            completion.metrics = request_metrics(request.submitted_s, times_s,
                                                 len(request.prompt_token_ids))

"""How does a prompt become an answer? Prefill, then decode, for one request.

Prefill takes the whole prompt through the model, many tokens a pass; decode takes one token a
pass, the one that was just sampled. Chapter 01_first_token measures the two, chapter 07_kv_cache
tells why they differ. Left out: more than one request at a time, the engine's subject.
"""

from __future__ import annotations

import time

from .metrics import request_metrics
from .sampling import request_rng
from .stopping import StopStrings
from .tokenizer import IncrementalDecoder

# Prompt tokens a pass. Enough to keep the arithmetic units busy, and few enough that the scores
# of a chunk, [H, chunk, S], never become the largest thing in memory.
PREFILL_CHUNK = 512


def prefill(runner, token_ids, cache, chunk_size=PREFILL_CHUNK):
    """Take the prompt into the cache, behind what it holds; -> logits [V] of the last token."""
    for start in range(0, len(token_ids), chunk_size):
        chunk = token_ids[start : start + chunk_size]
        is_last = start + len(chunk) == len(token_ids)
        positions = list(range(cache.length, cache.length + len(chunk)))
        logits = runner.forward(chunk, positions, cache, rows=[-1] if is_last else [])
    return logits[0]


def decode(runner, logits, cache, request, rng, vocab_size):
    """Sample, feed back, sample; yields (token, the logits it was drawn from), without end.

    vocab_size: the tokenizer's. Some models pad V to a round number; no text has those tokens.
    """
    output_token_ids = []
    while True:
        logits = logits[:vocab_size]
        token = runner.sample(logits, request.params, rng.random(), request.prompt_token_ids,
                              output_token_ids, request.stop_token_ids)
        output_token_ids.append(token)
        yield token, logits
        logits = runner.forward([token], [cache.length], cache, rows=[0])[0]


def generate(runner, tokenizer, request, cache):
    """Answer a request; yields (completion, piece of text) after every token.

    cache: may hold a beginning of the prompt already, but not all of it: the last token's logits
    are still wanted. Its capacity bounds prompt and answer together. `request.output` is filled in
    on the way, and is right at every moment, also where the caller stops listening half-way.
    """
    num_cached_tokens, num_prompt_tokens = cache.length, len(request.prompt_token_ids)
    prompt_logits = prefill(runner, request.prompt_token_ids[num_cached_tokens:], cache)
    for completion in request.output.outputs:
        cache.truncate(num_prompt_tokens)  # every completion continues the same prompt
        rng = request_rng(request.params.seed, completion.index)
        writer = CompletionWriter(completion, tokenizer, request, cache.capacity)
        token_times_s = []
        try:
            for token, logits in decode(runner, prompt_logits, cache, request, rng,
                                        tokenizer.vocab_size):
                token_times_s.append(time.perf_counter())
                if request.params.logprobs is not None:
                    completion.logprobs.append(
                        runner.top_logprobs(logits, token, request.params.logprobs))
                yield completion, writer.add(token)
                if completion.finish_reason:
                    break
        finally:
            completion.metrics = request_metrics(request.submitted_s, token_times_s,
                                                 num_prompt_tokens, num_cached_tokens)


class CompletionWriter:
    """Turns the tokens of one completion into text, and decides when it is over."""

    def __init__(self, completion, tokenizer, request, context_len):
        self.completion = completion
        self.decoder = IncrementalDecoder(tokenizer, skip_special=True)
        self.stop_strings = StopStrings(request.params.stop)
        self.min_tokens = request.params.min_tokens
        self.end_token_ids = () if request.params.ignore_eos else request.stop_token_ids
        self.max_tokens = min(request.params.max_tokens,
                              context_len - len(request.prompt_token_ids))

    def add(self, token):
        """Append one token; -> the text that it settles. Sets `finish_reason` where it ends."""
        completion = self.completion
        completion.token_ids.append(token)
        num_tokens = len(completion.token_ids)
        may_stop = num_tokens >= self.min_tokens
        text = ""
        if token in self.end_token_ids and may_stop:
            completion.finish_reason = "stop"
        else:
            text = self.stop_strings.feed(self.decoder.feed(token), may_stop)
            if self.stop_strings.found is not None:
                completion.finish_reason = "stop"
            elif num_tokens >= self.max_tokens:
                completion.finish_reason = "length"
        if completion.finish_reason and self.stop_strings.found is None:
            text += self.stop_strings.feed(self.decoder.flush()) + self.stop_strings.flush()
        completion.text += text
        return text

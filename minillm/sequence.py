"""What does the engine remember of an answer on its way?

A request asks for n answers, and each is a sequence: the tokens of the prompt and those sampled so
far, how many of them have keys and values, and in which blocks these lie. Preempting a sequence
takes its blocks; nothing else is lost. Chapter 10_continuous_batching tells the story.
"""

from __future__ import annotations

from .block_manager import BlockTable
from .generate import CompletionWriter
from .metrics import request_metrics
from .sampling import request_rng


class Sequence:
    """One completion of a request, from its prompt to its end.

    order: (number of the request, index of the completion), who came first.
    token_ids: prompt and answer.   num_computed_tokens: those whose keys and values are written.
    num_cached_tokens: prompt tokens that were computed before, for another request; None before the
    sequence is first admitted.   siblings: the request's other completions, until they are forked.
    """

    def __init__(self, request, completion, arrival, block_size):
        self.request, self.completion = request, completion
        self.order = (arrival, completion.index)
        self.token_ids = list(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = None
        self.num_preemptions = 0
        self.block_table = BlockTable(block_size)
        self.block_hashes = []
        self.siblings = []

    @property
    def num_uncomputed_tokens(self):
        """1 for a sequence that decodes, the token sampled last; more for prefill."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self):
        """False while the prompt is computed, or what a preemption took away."""
        num_prompt_tokens = len(self.request.prompt_token_ids)
        return num_prompt_tokens <= self.num_computed_tokens == len(self.token_ids) - 1


class Answer:
    """The side of a sequence that the scheduler does not see: randomness, text and the clock."""

    def __init__(self, sequence, tokenizer, context_len):
        self.sequence = sequence
        self.request = sequence.request
        self.completion = sequence.completion
        self.request_id, _ = sequence.order
        self.writer = CompletionWriter(self.completion, tokenizer, self.request, context_len)
        self.rng = request_rng(self.request.params.seed, self.completion.index)
        self.u = None
        self.token_times_s = []

    def takes_best_token(self):
        return self.request.params.takes_best_token(len(self.completion.token_ids))

    def sample(self, runner, logits):
        """-> the next token, from its logits [V]. A step that breaks off after this will sample it
        again, from the same random number."""
        if self.u is None:
            self.u = self.rng.random()
        return runner.sample(logits, self.request.params, self.u, self.request.prompt_token_ids,
                             self.completion.token_ids, self.request.stop_token_ids)

    def add(self, token, time_s, logprobs):
        """Write a token down, which came at time_s;  -> the text that it settles."""
        self.u = None
        self.sequence.token_ids.append(token)
        self.token_times_s.append(time_s)
        if logprobs is not None:
            self.completion.logprobs.append(logprobs)
        text = self.writer.add(token)
        if self.completion.finish_reason:
            self.close()
        return text

    def close(self):
        """The metrics of what came."""
        self.completion.metrics = request_metrics(
            self.request.submitted_s, self.token_times_s, len(self.request.prompt_token_ids),
            self.sequence.num_cached_tokens or 0)

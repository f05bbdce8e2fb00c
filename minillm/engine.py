"""How do many requests go through one model? In-flight (continuous) batching.

Each step takes one batch through the model: a token of every answer on its way, and pieces of
prompts. A request joins when there is room and leaves when it is done; nobody waits for a batch to
end. (Yu et al. 2022, "Orca".) The loop is `Engine.step`, four lines. Chapter
10_continuous_batching tells the story.

The engine is not for several threads. A step that breaks off (Ctrl-C, a NaN) leaves it whole: what
was in the step is computed again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from numbers import Integral

from .block_manager import BlockManager
from .errors import InputError
from .scheduler import Scheduler
from .sequence import Answer, Sequence

DEFAULT_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine may take on.   Raises InputError for what cannot work.

    max_num_seqs: sequences that run at the same time, at most.
    max_num_batched_tokens: tokens a step, at most; a longer prompt is computed in pieces. Small:
        answers on their way go on evenly while a prompt comes in. Large: prompts come in faster.
    block_size: tokens a block of the cache.   num_blocks: the whole cache; None: 1 GiB, or one
        context of the model where that is more.
    enable_prefix_caching: keep the blocks of what has been computed, for requests that begin alike.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self):
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"):
            value = getattr(self, name)
            is_default = name == "num_blocks" and value is None
            if not is_default and (not isinstance(value, Integral) or isinstance(value, bool)
                                   or value < 1):
                raise InputError(f"{name} is {value!r}, must be an integer of at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(f"max_num_batched_tokens is {self.max_num_batched_tokens}, must be at "
                             f"least max_num_seqs, which is {self.max_num_seqs}: every sequence "
                             "that runs may want a token in a step")
        if not isinstance(self.enable_prefix_caching, bool):
            raise InputError(f"enable_prefix_caching is {self.enable_prefix_caching!r}, must be "
                             "True or False")


@dataclass(frozen=True)
class StepOutput:
    """What one step did.

    texts: [(request id, completion, text that its new token settled), ...]
    scheduled: [(request id, index of the completion, tokens computed, is_prefill), ...]
    """

    texts: list
    scheduled: list


class Engine:
    """Requests in, tokens out, one step at a time.

    runner: a model of either backend.   tokenizer: turns tokens into text as they come.
    """

    def __init__(self, runner, tokenizer, config=EngineConfig()):
        self.runner, self.tokenizer, self.config = runner, tokenizer, config
        self.context_len = runner.weights.config.max_position_embeddings
        self.is_stepping, self.aborted_meanwhile = False, []
        num_blocks = config.num_blocks
        try:
            num_blocks = num_blocks or default_num_blocks(runner, config.block_size)
            self.cache = runner.new_paged_cache(num_blocks, config.block_size)
        except (MemoryError, ValueError, RuntimeError):  # as NumPy, or PyTorch, or CUDA says it
            raise InputError(f"num_blocks is {num_blocks} and block_size {config.block_size}: no "
                             "memory for so large a cache, lower them") from None
        blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.answers = {}  # request id -> {index of the completion: Answer}, while unfinished
        self.num_requests = 0

    def check(self, request):
        """Raise InputError for a request that could never be finished."""
        num_prompt_tokens = len(request.prompt_token_ids)
        if not 1 <= num_prompt_tokens < self.context_len:
            raise InputError(f"the prompt has {num_prompt_tokens} tokens, must have 1 to "
                             f"{self.context_len - 1}, so that the context holds an answer as well")
        num_tokens = min(num_prompt_tokens + request.params.max_tokens, self.context_len)
        blocks = self.scheduler.blocks
        if not blocks.fits_when_alone(num_tokens):
            raise InputError(
                f"a prompt of {num_prompt_tokens} tokens and an answer of up to "
                f"{num_tokens - num_prompt_tokens} cannot fit in the KV cache of "
                f"{blocks.num_blocks} blocks of {blocks.block_size}: shorten them, or raise "
                "num_blocks")

    def add_request(self, request):
        """-> the request's id. It waits, which costs no cache, until a step has room for it."""
        self.check(request)
        request_id, self.num_requests = self.num_requests, self.num_requests + 1
        sequences = [Sequence(request, completion, request_id, self.config.block_size)
                     for completion in request.output.outputs]
        self.answers[request_id] = {
            sequence.completion.index: Answer(sequence, self.tokenizer, self.context_len)
            for sequence in sequences}
        first, *first.siblings = sequences
        self.scheduler.add(first)
        return request_id

    def abort(self, request_id):
        """Drop what is unfinished of a request, and free its blocks at once. One that has ended,
        or never was, is no error: who aborts cannot know."""
        if self.is_stepping:  # Python's garbage collector has closed a stream, in the middle of it
            self.aborted_meanwhile.append(request_id)
            return
        for answer in self.answers.pop(request_id, {}).values():
            self.scheduler.remove(answer.sequence)
            answer.close()

    def is_unfinished(self, request_id):
        return request_id in self.answers

    def step(self):
        """Compute one batch;  -> StepOutput. Nothing happens if no request is unfinished."""
        try:
            self.is_stepping = True
            batch = self.scheduler.schedule()
            logits = self.forward(batch)
            sampled = self.sample(batch, logits)
            return self.update(batch, sampled)
        except BaseException as error:
            self._restart(has_nan=isinstance(error, FloatingPointError))
            raise
        finally:
            self.is_stepping = False
            while self.aborted_meanwhile:
                self.abort(self.aborted_meanwhile.pop())

    def forward(self, batch):
        """-> logits [R, vocabulary] of the R sequences whose next token is due."""
        self.cache.copy_blocks(batch.copies)
        if not batch.tokens:
            return None
        # Some models pad V to a round number; no text has the tokens beyond the tokenizer's.
        return self.runner.forward_batch(batch, self.cache)[:, : self.tokenizer.vocab_size]

    def sample(self, batch, logits):
        """-> [(answer, its next token, logprobs or None), ...]. Where the prompt of a request that
        wants several answers is complete, the first token of each is drawn from the same row."""
        due = [(self.answer_of(sequence), row) for row, first in enumerate(batch.sampling)
               for sequence in (first, *first.siblings)]
        takes_best = [answer.takes_best_token() for answer, _ in due]
        best = self.runner.best_tokens(logits) if any(takes_best) else None  # one call for all rows
        sampled = []
        for (answer, row), is_best in zip(due, takes_best):
            token = best[row] if is_best else answer.sample(self.runner, logits[row])
            num_logprobs = answer.request.params.logprobs
            logprobs = (None if num_logprobs is None else
                        self.runner.top_logprobs(logits[row], token, num_logprobs))
            sampled.append((answer, token, logprobs))
        return sampled

    def update(self, batch, sampled):
        """Write the tokens down; who has come to an end leaves."""
        scheduled = [(*sequence.order, num_tokens, not sequence.is_decoding)
                     for sequence, num_tokens in batch.scheduled]
        self.scheduler.update(batch)
        time_s, texts = time.perf_counter(), []
        for answer, token, logprobs in sampled:
            text = answer.add(token, time_s, logprobs)
            texts.append((answer.request_id, answer.completion, text))
            self._leave_if_ended(answer)
        return StepOutput(texts, scheduled)

    def answer_of(self, sequence):
        request_id, index = sequence.order
        return self.answers[request_id][index]

    def _restart(self, has_nan):
        """A step broke off: compute again what it, and whoever ran, had computed; from the
        beginning if there is a NaN. It may have been in a prompt's keys for steps before a logit
        showed it, and whoever has such a block in a table has the NaN, even behind a mask."""
        answers = [answer for each in self.answers.values() for answer in each.values()]
        self.cache.clear_blocks(self.scheduler.restart([answer.sequence for answer in answers],
                                                       forgets_all=has_nan))
        for answer in answers:
            self._leave_if_ended(answer)

    def _leave_if_ended(self, answer):
        if answer.completion.finish_reason:
            self.scheduler.remove(answer.sequence)
            answers = self.answers[answer.request_id]
            if len(answers) > 1:
                del answers[answer.completion.index]
            else:
                del self.answers[answer.request_id]


def default_num_blocks(runner, block_size):
    """1 GiB, or one context of the model where that is more."""
    block_bytes = sum(array.nbytes for array in runner.new_paged_cache(1, block_size).arrays())
    context_len = runner.weights.config.max_position_embeddings
    return max(DEFAULT_CACHE_BYTES // block_bytes, -(-context_len // block_size))

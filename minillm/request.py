"""What is asked of the engine, and what it answers: a request, its completions, its output.

The names are vLLM's. A request asks for `n` completions of one prompt; for the common case of
one, `RequestOutput` shows that completion's fields as its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .metrics import RequestMetrics
from .sampling_params import SamplingParams


@dataclass
class CompletionOutput:
    """One answer, as far as it has come.

    text: without stop strings and special tokens; token_ids: every token that was sampled.
    logprobs: for each token, {token id: natural log of its probability}; None if not asked for.
    finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, or the end of the
    context), None while unfinished.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    metrics: RequestMetrics | None = None


@dataclass
class RequestOutput:
    """The answers to one request."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def text(self):
        return self.outputs[0].text

    @property
    def token_ids(self):
        return self.outputs[0].token_ids

    @property
    def logprobs(self):
        return self.outputs[0].logprobs

    @property
    def finish_reason(self):
        return self.outputs[0].finish_reason

    @property
    def metrics(self):
        return self.outputs[0].metrics


class Request:
    """A prompt, how to continue it, and the moment when that was asked for."""

    def __init__(self, prompt_token_ids: list[int], params: SamplingParams,
                 stop_token_ids: tuple[int, ...]):
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.submitted_s = time.perf_counter()
        self.output = RequestOutput(prompt_token_ids, [
            CompletionOutput(index, logprobs=None if params.logprobs is None else [])
            for index in range(params.n)
        ])

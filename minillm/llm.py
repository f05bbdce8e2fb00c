"""The front door: weights, tokenizer and generation behind one object.

    llm = LLM("smollm2-135m-instruct")
    print(llm.generate(["Once upon a time"], SamplingParams(temperature=0.0))[0].text)
"""

from __future__ import annotations

import operator

from tqdm import tqdm

from .chat_template import TemplateSandbox, encode_chat
from .errors import InputError
from .generate import generate
from .loading import open_checkpoint
from .loading.registry import resolve
from .model_runner import make_runner
from .quantize_model import quantize_checkpoint
from .request import Request
from .sampling_params import SamplingParams


class LLM:
    """A model that answers.

    model: a name in the registry (fetched on first use), a .gguf file, a .safetensors file that
    `minillm quantize` wrote, a Hugging Face style folder, or a hub id.
    backend: "torch" or "numpy".   device: "auto", "cpu", "cuda", "cuda:1".
    dtype: "auto", "float32", "bfloat16" or "float16"; NumPy computes in float32.
    quantize: None, or how to store the weights: "int8", "int4", "w8a8", "native" and others, see
    `quantize_model.py`.   kv_dtype: "auto", or "int8" for a KV cache of half the size.
    Raises InputError for what is not there, cannot be read or is not supported.
    """

    def __init__(self, model="smollm2-135m-instruct", backend="torch", device="auto", dtype="auto",
                 quantize=None, kv_dtype="auto"):
        checkpoint = open_checkpoint(resolve(model))
        if quantize is not None:
            checkpoint = quantize_checkpoint(checkpoint, quantize)
        self.quantize = checkpoint.quantize
        self.model = str(model)
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer()
        self.chat_template = checkpoint.chat_template
        # Some models pad V to a round number; no text has the tokens beyond the tokenizer's.
        self.vocab_size = min(self.config.vocab_size, self.tokenizer.vocab_size)
        self.stop_token_ids = checkpoint.eos_token_ids
        if max(self.stop_token_ids, default=0) >= self.vocab_size:
            raise InputError(f"{self.model} ends answers with token {max(self.stop_token_ids)}, "
                             f"and has only {self.vocab_size} tokens: get the model again")
        self.runner = make_runner(checkpoint, backend, device, dtype, kv_dtype)
        self.template_sandbox = TemplateSandbox()

    def generate(self, prompts, params=None, progress=False):
        """Answer each prompt; -> a list of RequestOutput, in their order.

        prompts: a str, a list of token ids, or a list of either.   params: one SamplingParams for
        all, or one for each.   progress: show a bar on standard error.
        """
        is_text = isinstance(prompts, (str, bytes, dict)) or not hasattr(prompts, "__iter__")
        prompts = [prompts] if is_text else list(prompts)
        if prompts and is_integer(prompts[0]):
            prompts = [prompts]
        params = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise InputError(f"{len(params)} SamplingParams for {len(prompts)} prompts: give one, "
                             "or one for each")
        requests = [self._request(self.encode_prompt(prompt), each)
                    for prompt, each in zip(prompts, params)]
        for request in tqdm(requests, disable=not progress, desc="answering", unit="prompt"):
            self._finish(request)
        return [request.output for request in requests]

    def chat(self, messages, params=None):
        """Answer a conversation [{"role": "user", "content": "Hi"}, ...]; -> RequestOutput."""
        request = self._request(self.encode_chat(messages), params)
        self._finish(request)
        return request.output

    def stream(self, prompt, params=None):
        """Answer a prompt (a str, token ids, or a list of messages), piece by piece.

            stream = llm.stream("Once upon a time")
            for piece in stream:
                print(piece, end="", flush=True)
            print(stream.output.metrics.tpot_ms)
        """
        is_chat = bool(prompt) and isinstance(prompt[0], dict)
        token_ids = self.encode_chat(prompt) if is_chat else self.encode_prompt(prompt)
        return self._stream(self._request(token_ids, params))

    def conversation(self, system=None):
        """A conversation that remembers, and computes no turn twice."""
        return Conversation(self, system)

    def logits(self, token_ids):
        """Teacher-forced scores: row t is what the model expects after token t.

        token_ids: T of them  ->  np.ndarray float32 [T, V].
        """
        token_ids = self._check_token_ids(token_ids)
        if not token_ids:
            raise InputError("there are no tokens to score, the list is empty: give at least one")
        if len(token_ids) > self.context_len:
            raise InputError(f"{len(token_ids)} tokens do not fit in this model's context of "
                             f"{self.context_len}: score them in pieces")
        cache = self.runner.new_cache(len(token_ids))
        positions = list(range(len(token_ids)))
        return self.runner.to_numpy(self.runner.forward(token_ids, positions, cache))

    @property
    def context_len(self):
        """Tokens that prompt and answer may have together."""
        return self.config.max_position_embeddings

    def encode_prompt(self, prompt):
        """A text as token ids, with the token that begins a text where the model wants one.

        What looks like a special token in it is text. Token ids are taken as they are.
        """
        if not isinstance(prompt, str):
            return self._check_token_ids(prompt)
        starts_with_bos = self.tokenizer.add_bos_token and prompt
        return [self.tokenizer.bos_token_id] * bool(starts_with_bos) + self.tokenizer.encode(prompt)

    def encode_chat(self, messages):
        """A conversation as token ids, laid out by the model's own template."""
        if self.chat_template is None:
            raise InputError(f"{self.model} has no chat template, it continues texts: use "
                             "generate without chat, or an instruction-tuned model")
        return encode_chat(self.tokenizer, self.chat_template, messages,
                           sandbox=self.template_sandbox)

    def _check_token_ids(self, token_ids):
        """Token ids of any library as a list of int."""
        if isinstance(token_ids, (bytes, dict)) or not hasattr(token_ids, "__iter__"):
            raise InputError(f"prompt {token_ids!r:.80} must be a str or token ids; messages go to "
                             "chat or stream")
        checked = []
        for token in token_ids:
            if not is_integer(token) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise InputError(f"token id {token!r:.80} must be an integer from 0 to "
                                 f"{self.vocab_size - 1}")
            checked.append(operator.index(token))
        return checked

    def _request(self, prompt_token_ids, params):
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InputError(f"params {params!r:.80} must be a SamplingParams, or None")
        params.check_vocab(self.vocab_size)
        if not prompt_token_ids:
            raise InputError("the prompt is empty: give at least one token")
        if len(prompt_token_ids) >= self.context_len:
            raise InputError(f"the prompt has {len(prompt_token_ids)} tokens, and this model's "
                             f"context of {self.context_len} must hold it and at least one "
                             "token of answer: shorten it")
        return Request(prompt_token_ids, params, self.stop_token_ids)

    def _new_cache(self, request):
        num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
        return self.runner.new_cache(min(num_tokens, self.context_len))

    def _finish(self, request):
        for _ in generate(self.runner, self.tokenizer, request, self._new_cache(request)):
            pass

    def _stream(self, request, cache=None):
        if request.params.n > 1:
            raise InputError(f"n is {request.params.n}, must be 1 in a stream: use generate")
        cache = cache or self._new_cache(request)
        return Stream(request.output, generate(self.runner, self.tokenizer, request, cache))


class Stream:
    """An answer on its way: iterate over its text; `output` is what has come so far."""

    def __init__(self, output, steps):
        self.output = output
        self._steps = steps

    def __iter__(self):
        try:
            for _, piece in self._steps:
                if piece:
                    yield piece
        finally:
            self.close()  # whoever leaves early gets the metrics of what came

    def close(self):
        """Break the answer off where it is."""
        self._steps.close()


class Conversation:
    """Messages, and the cache of everything said so far.

    A new turn's prompt begins as the last one did: only what is new goes through the model.
    """

    def __init__(self, llm, system=None):
        self.llm = llm
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cache = llm.runner.new_cache(llm.context_len)
        self.cached_token_ids = []
        self._stream = None  # the answer on its way

    def say(self, text, params=None):
        """Yield the answer to one more user message, piece by piece; returns its RequestOutput.

        Also when it is broken off (an exception, the caller stops listening, or says something
        else) the conversation goes on from what was said until then.
        """
        self._settle()
        messages = [*self.messages, {"role": "user", "content": text}]
        request = self.llm._request(self.llm.encode_chat(messages), params)
        stream = self.llm._stream(request, self.cache)
        self._keep_common_prefix(request.prompt_token_ids)
        self.messages, self._stream = messages, stream
        try:
            yield from stream
        finally:
            if self._stream is stream:
                self._settle()
        return request.output

    def _settle(self):
        """End the answer that is on its way, if there is one, and remember what came of it."""
        if self._stream is None:
            return
        self._stream.close()
        output, self._stream = self._stream.output, None
        self.messages.append({"role": "assistant", "content": output.text})
        self.cached_token_ids = (output.prompt_token_ids + output.token_ids)[:self.cache.length]

    def _keep_common_prefix(self, token_ids):
        # The last token of a prompt is always computed: its logits are what the answer starts from.
        limit = min(len(self.cached_token_ids), len(token_ids) - 1)
        same = 0
        while same < limit and self.cached_token_ids[same] == token_ids[same]:
            same += 1
        self.cache.truncate(same)


def is_integer(value):
    """Also NumPy's, and a tensor that is one number; their arrays have an __index__ as well."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0

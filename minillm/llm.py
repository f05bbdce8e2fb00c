"""The front door: weights, tokenizer and generation behind one object.

    llm = LLM("smollm2-135m-instruct")
    print(llm.generate(["Once upon a time"], SamplingParams(temperature=0.0))[0].text)
"""

from __future__ import annotations

import functools
import operator

from tqdm import tqdm

from .batching import generate_static
from .chat_template import TemplateSandbox, encode_chat
from .engine import Engine, EngineConfig
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
    batching: "continuous", many requests in one paged cache; "static", padded batches of up to
    max_num_seqs, one after the other (a request that wants more answers is a batch by itself);
    "none", one request after the other. The texts are the same.
    engine_options: the fields of EngineConfig, such as max_num_seqs, max_num_batched_tokens and
    num_blocks, for continuous batching; a static batch takes max_num_seqs alone, "none" takes none.
    One thread at a time may call it.
    Raises InputError for what is not there, cannot be read or is not supported.
    """

    def __init__(self, model="smollm2-135m-instruct", backend="torch", device="auto", dtype="auto",
                 quantize=None, kv_dtype="auto", batching="continuous", **engine_options):
        if not isinstance(batching, str) or batching not in BATCHING:
            raise InputError(f"batching {batching!r} is unknown: choose one of "
                             f"{', '.join(BATCHING)}")
        if batching == "static" and kv_dtype != "auto":
            raise InputError(f"kv_dtype {kv_dtype!r} is not for a static batch: use batching "
                             "'continuous' or 'none'")
        self.batching, self.engine_config = batching, EngineConfig(**engine_options)
        unread = set(engine_options) - {"static": {"max_num_seqs"}, "none": set()}.get(
            batching, set(engine_options))
        if unread:
            raise InputError(f"{', '.join(sorted(unread))} is not for batching {batching!r}: leave "
                             "it out, or use batching 'continuous'")
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

    @functools.cached_property
    def engine(self):
        """Where requests run together; made, and its cache with it, when the first one comes."""
        return Engine(self.runner, self.tokenizer, self.engine_config)

    def generate(self, prompts, params=None, progress=False):
        """Answer each prompt; -> a list of RequestOutput, in their order.

        prompts: a str, a list of token ids, or a list of either; many run at the same time.
        params: one SamplingParams for all, or one for each.   progress: a bar on standard error.
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
        with tqdm(total=len(requests), disable=not progress, desc="answer", unit="prompt") as bar:
            BATCHING[self.batching](self, requests, bar)
        return [request.output for request in requests]

    def chat(self, messages, params=None):
        """Answer a conversation [{"role": "user", "content": "Hi"}, ...]; -> RequestOutput."""
        return self.generate([self.encode_chat(messages)], params)[0]

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
        """A conversation that remembers; with continuous batching no turn is computed twice."""
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
        request = Request(prompt_token_ids, params, self.stop_token_ids)
        if self.batching == "continuous":
            self.engine.check(request)
        return request

    def _run_continuous(self, requests, bar):
        """All at once, and whoever streams beside them goes on as well."""
        unfinished = set()
        try:
            for request in requests:
                unfinished.add(self.engine.add_request(request))
            while unfinished:
                self.engine.step()
                ended = {each for each in unfinished if not self.engine.is_unfinished(each)}
                unfinished -= ended
                bar.update(len(ended))
        finally:
            for request_id in unfinished:
                self.engine.abort(request_id)

    def _run_static(self, requests, bar):
        """As many at once as there are seats; the next ones begin when the last one has ended."""
        batch, num_rows = [], 0
        for request in requests:
            if batch and num_rows + request.params.n > self.engine_config.max_num_seqs:
                generate_static(self.runner, self.tokenizer, batch)
                bar.update(len(batch))
                batch, num_rows = [], 0
            batch.append(request)
            num_rows += request.params.n
        if batch:
            generate_static(self.runner, self.tokenizer, batch)
            bar.update(len(batch))

    def _run_one_by_one(self, requests, bar):
        """Chapter 07's loop, one request after the other."""
        for request in requests:
            for _ in self._steps_alone(request):
                pass
            bar.update()

    def _steps(self, request):
        """(completion, piece of text) as it comes; whoever else runs goes on meanwhile."""
        completion, num_shown = request.output.outputs[0], 0
        request_id = self.engine.add_request(request)
        try:
            while num_shown < len(completion.text) or self.engine.is_unfinished(request_id):
                if num_shown == len(completion.text):
                    self.engine.step()
                piece = completion.text[num_shown:]
                num_shown += len(piece)
                yield completion, piece
        finally:
            self.engine.abort(request_id)

    def _steps_alone(self, request):
        num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
        cache = self.runner.new_cache(min(num_tokens, self.context_len))
        return generate(self.runner, self.tokenizer, request, cache)

    def _stream(self, request):
        if request.params.n > 1:
            raise InputError(f"n is {request.params.n}, must be 1 in a stream: use generate")
        # A static batch shows nothing before it ends; a stream is one request.
        steps = self._steps if self.batching == "continuous" else self._steps_alone
        return Stream(request.output, steps(request))


BATCHING = {"continuous": LLM._run_continuous, "static": LLM._run_static,
            "none": LLM._run_one_by_one}


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
    """Messages, and the answer on its way.

    A new turn's prompt begins with all that was said before: the engine finds it in its cache, but
    for the last tokens, which fill no block, and only what is new goes through the model.
    """

    def __init__(self, llm, system=None):
        self.llm = llm
        self.messages = [{"role": "system", "content": system}] if system else []
        self._stream = None  # the answer on its way

    def say(self, text, params=None):
        """Yield the answer to one more user message, piece by piece; returns its RequestOutput.

        Also when it is broken off (an exception, the caller stops listening, or says something
        else) the conversation goes on from what was said until then.
        """
        self._settle()
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self.llm.stream(messages, params)
        self.messages, self._stream = messages, stream
        try:
            yield from stream
        finally:
            if self._stream is stream:
                self._settle()
        return stream.output

    def _settle(self):
        """End the answer that is on its way, if there is one, and remember what came of it."""
        if self._stream is None:
            return
        self._stream.close()
        output, self._stream = self._stream.output, None
        self.messages.append({"role": "assistant", "content": output.text})


def is_integer(value):
    """Also NumPy's, and a tensor that is one number; their arrays have an __index__ as well."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0

"""How are several engines measured side by side? Each in a process of its own, in turns.

An engine class has `imports(...)`, which does before the clock starts what is not loading a model,
a constructor with the same arguments that loads, and methods that answer, always greedily, with as
many tokens as are asked for, whatever the model says:

    answer(token_ids, num_tokens)        -> the tokens, the seconds from submission to each of them
    answer_many(prompts, nums_tokens)    -> a list of tokens for each prompt, the seconds from the
                                            submission of all to the end of the last one, and how
                                            many rows went through the model for them

`Worker` runs one in another process, so that no library's threads or memory disturb another's.
`llamacpp.py` has more engines.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import time

import numpy as np
from tqdm import tqdm

from ..loading.registry import resolve
from .machine import peak_memory_bytes


class Minillm:
    """This project, through its public interface, on the CPU."""

    @staticmethod
    def imports(model, backend="torch", *others):
        from .. import LLM  # noqa: F401
        from ..kernels import load_kernel

        if backend == "torch":
            import torch  # noqa: F401

            for name in ("quantized_matmul", "paged_attention"):
                load_kernel(name)  # which is compiled once on a machine

    def __init__(self, model, backend="torch", dtype="auto", quantize=None, kv_dtype="auto",
                 **options):
        from .. import LLM

        if options.get("batching", "continuous") == "continuous":
            options["enable_prefix_caching"] = False  # each round asks the same, and computes it
        self.llm = LLM(model, backend, "cpu", dtype, quantize, kv_dtype,
                       **options)
        self.num_rows = 0
        self.forward, self.llm.runner.forward = self.llm.runner.forward, self._counting_forward

    @staticmethod
    def greedy(num_tokens):
        from .. import SamplingParams

        return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)

    def answer(self, prompt_token_ids, num_tokens):
        output = self.llm.generate([prompt_token_ids], self.greedy(num_tokens))[0]
        gaps_ms = [output.metrics.ttft_ms, *output.metrics.itl_ms]
        return output.token_ids, (np.cumsum(gaps_ms) / 1000).tolist()

    def answer_many(self, prompts, nums_tokens):
        self.num_rows, start_s = 0, time.perf_counter()
        outputs = self.llm.generate(prompts, [self.greedy(num) for num in nums_tokens])
        seconds = time.perf_counter() - start_s
        return [output.token_ids for output in outputs], seconds, self.num_rows

    def _counting_forward(self, tokens, positions, cache, rows=None):
        self.num_rows += len(tokens)
        return self.forward(tokens, positions, cache, rows)


class Transformers:
    """Hugging Face transformers: the same file, dequantized by it, and its own generate().

    max_num_seqs: prompts that it is given at once, padded on the left; the next ones follow when
    all of them have their answers.
    """

    @staticmethod
    def imports(model, *others):
        import gguf  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    def __init__(self, model, dtype, max_num_seqs=64):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.model = self.load(model, dtype).eval()
        self.model.generation_config.eos_token_id = None  # as ignore_eos: exactly num_tokens
        self.max_num_seqs, self.num_rows = max_num_seqs, 0
        self.model.get_input_embeddings().register_forward_pre_hook(self._count)

    def load(self, model, dtype):
        import torch
        from transformers import AutoModelForCausalLM

        path = resolve(model)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=getattr(torch, dtype))

    def answer(self, prompt_token_ids, num_tokens):
        import torch

        clock = TokenClock()
        with torch.inference_mode():
            ids = self.model.generate(torch.tensor([prompt_token_ids]), max_new_tokens=num_tokens,
                                      do_sample=False, streamer=clock,
                                      attention_mask=torch.ones(1, len(prompt_token_ids)))
        return ids[0, len(prompt_token_ids):].tolist(), clock.times_s

    def answer_many(self, prompts, nums_tokens):
        self.num_rows, start_s, answers = 0, time.perf_counter(), []
        for first in range(0, len(prompts), self.max_num_seqs):
            batch = slice(first, first + self.max_num_seqs)
            answers += self._answer_batch(prompts[batch], nums_tokens[batch])
        return answers, time.perf_counter() - start_s, self.num_rows

    def _answer_batch(self, prompts, nums_tokens):
        """As long as the longest answer wants; the others are cut."""
        import torch

        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):] = torch.tensor(prompt)
            mask[row, width - len(prompt):] = 1
        with torch.inference_mode():
            ids = self.model.generate(ids, attention_mask=mask, max_new_tokens=max(nums_tokens),
                                      do_sample=False)
        return [row[width : width + num].tolist() for row, num in zip(ids, nums_tokens)]

    def _count(self, module, arguments):
        self.num_rows += arguments[0].numel()


class TokenClock:
    """What generate() calls a streamer: told of the prompt, then of every token as it comes."""

    def __init__(self):
        self.start_s = time.perf_counter()
        self.times_s = []
        self.seen_prompt = False

    def put(self, value):
        if self.seen_prompt:
            self.times_s.append(time.perf_counter() - self.start_s)
        self.seen_prompt = True

    def end(self):
        """generate() announces the end; nothing is left to do."""


class Worker:
    """An engine in a process of its own, asked one question at a time.

    arguments, options: those of the engine's constructor.
    load_s: seconds that its constructor took: the imports are done, and the file is in the page
    cache. memory_before_bytes: the peak until then, which is Python and the libraries.
    """

    def __init__(self, engine, *arguments, **options):
        read_into_page_cache(resolve(arguments[0]))
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(engine, arguments, options, theirs),
                                       daemon=True)
        self.process.start()
        theirs.close()
        self.load_s, self.memory_before_bytes = self._receive()

    def answer(self, prompt_token_ids, num_tokens):
        return self._ask("answer", prompt_token_ids, num_tokens)

    def answer_many(self, prompts, nums_tokens):
        return self._ask("answer_many", prompts, nums_tokens)

    def peak_memory_bytes(self):
        """The most that was resident so far: libraries, weights, and pages of a mapped file."""
        return self._ask("peak_memory_bytes")

    def _ask(self, *question):
        self.pipe.send(question)
        return self._receive()

    def _receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"an engine's process ended with {self.process.exitcode}: what it "
                               "says stands above") from None

    def close(self):
        self.pipe.close()  # which ends `serve`
        self.process.join()


def serve(engine, arguments, options, pipe):
    """Runs in the worker's process, until the pipe closes."""
    engine.imports(*arguments)
    memory_before_bytes = peak_memory_bytes()
    start_s = time.perf_counter()
    loaded = engine(*arguments, **options)
    pipe.send((time.perf_counter() - start_s, memory_before_bytes))
    while True:
        try:
            method, *question = pipe.recv()
        except EOFError:
            return
        pipe.send(peak_memory_bytes() if method == "peak_memory_bytes"
                  else getattr(loaded, method)(*question))


def read_into_page_cache(path):
    with open(path, "rb") as file:
        while file.read(2**20):
            pass


def in_process(function):
    """function(), in a process that ends with it: its threads and memory are gone afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


@contextlib.contextmanager
def open_workers(entries, options=None):
    """{name: (engine, its arguments ...)} -> {name: Worker}, while the context lasts; one loads
    after the other, so that no two loads disturb each other.

    options: {name: {the arguments that are given by name}}, for those who have any
    """
    workers = {}
    try:
        for name, entry in tqdm(entries.items(), desc="load", unit="engine"):
            workers[name] = Worker(*entry, **(options or {}).get(name, {}))
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def take_turns(workers, rounds, decode_prompt, num_tokens, prefill_prompt):
    """Every worker answers in every round; -> samples, {name: the answer's token ids}."""
    for worker in workers.values():  # warm-up: allocators, thread pools, first-call set-up
        worker.answer(decode_prompt, 4)
        worker.answer(prefill_prompt, 1)
    samples, answers = [], {}
    turns = [(number, name) for number in range(rounds) for name in workers]
    for number, name in tqdm(turns, desc="take turns", unit="turn"):
        token_ids, times_s = workers[name].answer(decode_prompt, num_tokens)
        _, prefill_times_s = workers[name].answer(prefill_prompt, 1)
        answers[name] = token_ids
        samples.append({"contestant": name, "round": number, "token_times_s": times_s,
                        "prefill_s": prefill_times_s[0]})
    return samples, answers


def speeds_of(samples, prefill_tokens):
    """-> decode and prefill of every round, in tokens/s. The first token belongs to no decoding."""
    decode = [(len(times) - 1) / (times[-1] - times[0])
              for times in (sample["token_times_s"] for sample in samples)]
    return decode, [prefill_tokens / sample["prefill_s"] for sample in samples]

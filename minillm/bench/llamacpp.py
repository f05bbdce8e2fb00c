"""llama.cpp, as engines to be measured beside ours; no requirement of minillm.

`pip install llama-cpp-python==0.3.36` brings it in, and builds it with the compiler of the machine
for the processor of the machine. What is called here are its C functions: the Python class around
them would cost llama.cpp a few percent of its speed. Settings that are not named are its defaults;
its keys and values are float16, and its activations are quantized to int8 before every product.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time

import numpy as np

from ..errors import InputError
from ..loading.registry import resolve

LLAMA_CPP = "llama-cpp-python==0.3.36"  # the version that this was tested with
CONTEXT, BATCH = 1024, 512


class LlamaCpp:
    """An engine, as `engines.py` describes one."""

    @staticmethod
    def imports(model):
        import_llama_cpp()

    def __init__(self, model):
        self.lib = lib = import_llama_cpp()
        self.model = lib.llama_model_load_from_file(str(resolve(model)).encode(),
                                                    lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx = CONTEXT
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = num_threads()
        self.context = lib.llama_init_from_model(self.model, settings) if self.model else None
        if not self.context:
            raise InputError(f"llama.cpp cannot load {model}")
        self.memory = lib.llama_get_memory(self.context)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        # One batch for all calls. A token's entries never change, but for the two set in forward.
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        for i in range(BATCH):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0

    def clear(self):
        """Forget what was read: the KV cache is empty."""
        self.lib.llama_memory_clear(self.memory, True)

    def forward(self, token_ids, start, all_rows=False):
        """Read up to 512 tokens behind `start` others; -> logits [1 or all, V], gone with the next
        call: a view of llama.cpp's memory."""
        num_tokens = len(token_ids)
        self.batch.n_tokens = num_tokens
        for i, token in enumerate(token_ids):
            self.batch.token[i], self.batch.pos[i] = token, start + i
            self.batch.logits[i] = all_rows or i == num_tokens - 1
        code = self.lib.llama_decode(self.context, self.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode of {num_tokens} tokens behind {start} answered "
                               f"{code}")
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context),
                                     (num_tokens if all_rows else 1, self.vocab_size))

    def answer(self, prompt_token_ids, num_tokens):
        self.clear()
        start_s, times_s, token_ids, unread = time.perf_counter(), [], [], prompt_token_ids
        num_read = 0
        while len(token_ids) < num_tokens:
            logits = self.forward(unread, num_read)
            num_read += len(unread)
            unread = [int(logits[0].argmax())]
            token_ids += unread
            times_s.append(time.perf_counter() - start_s)
        return token_ids, times_s


class LlamaCppParallel(LlamaCpp):
    """llama.cpp's parallel sequences: one batch takes a token of each, as llama-batched-bench does.

    A context has room for a number of sequences. It keeps their keys and values apart, or in one
    memory in which each token's mask hides the others; which is faster depends on the machine, so
    the first question with that many prompts tries both, and the faster stays.

    room: tokens that a sequence may have; llama.cpp rounds it up to a multiple of 256.
    """

    def __init__(self, model, room=256):
        super().__init__(model)
        self.room = room
        self.lib.llama_free(self.context)
        self.contexts = {}  # number of sequences: the faster context

    def answer_many(self, prompts, nums_tokens):
        """All prompts have the same length, and so have all answers."""
        (num_prompt_tokens,), (num_tokens,) = set(map(len, prompts)), set(nums_tokens)
        if num_prompt_tokens + num_tokens > self.room:
            raise ValueError(f"{num_prompt_tokens} + {num_tokens} tokens, room is for {self.room}")
        if len(prompts) not in self.contexts:
            self.contexts[len(prompts)] = self._faster_context(prompts, num_tokens)
        self.context = self.contexts[len(prompts)]
        return self._answer_together(prompts, num_tokens)

    def _faster_context(self, prompts, num_tokens):
        contexts = {unified: self._new_context(len(prompts), unified) for unified in (False, True)}
        seconds = {unified: [] for unified in contexts}
        for unified in [*contexts] * 3:  # the first time each warms up
            self.context = contexts[unified]
            seconds[unified].append(self._answer_together(prompts, num_tokens)[1])
        faster = min(contexts, key=lambda unified: min(seconds[unified][1:]))
        self.lib.llama_free(contexts[not faster])
        return contexts[faster]

    def _new_context(self, num_seqs, unified):
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = num_seqs * self.room
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max, settings.kv_unified = num_seqs, unified
        settings.n_threads = settings.n_threads_batch = num_threads()
        context = self.lib.llama_init_from_model(self.model, settings)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {num_seqs} sequences")
        return context

    def _answer_together(self, prompts, num_tokens):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        T, num_rows, start_s = len(prompts[0]), 0, time.perf_counter()
        answers = [[] for _ in prompts]
        rows = [(prompt[t], t, i, t == T - 1) for i, prompt in enumerate(prompts) for t in range(T)]
        for step in range(num_tokens):
            for first in range(0, len(rows), BATCH):
                for i, token in self._best_tokens(rows[first : first + BATCH]):
                    answers[i].append(token)
            num_rows += len(rows)
            rows = [(answer[-1], T + step, i, True) for i, answer in enumerate(answers)]
        return answers, time.perf_counter() - start_s, num_rows

    def _best_tokens(self, rows):
        """rows: [(token, position, sequence, wants logits), ...], up to 512
        -> [(sequence, the best next token), ...] of those that want logits."""
        batch, batch.n_tokens = self.batch, len(rows)
        for row, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.seq_id[row][0], batch.logits[row] = sequence, wants_logits
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode of {len(rows)} rows answered {code}")
        sequences = [sequence for _, _, sequence, wants_logits in rows if wants_logits]
        if not sequences:
            return []
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context),
                                       (len(sequences), self.vocab_size))
        return list(zip(sequences, logits.argmax(axis=1).tolist()))


def import_llama_cpp():
    """The C functions of llama.cpp, which say nothing: what fails comes back as a code."""
    from llama_cpp import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    return llama_cpp


def has_llama_cpp():
    """True if llama.cpp is installed; says on standard error how to install it where it is not."""
    if importlib.util.find_spec("llama_cpp"):
        return True
    print(f"llama.cpp is left out, it is not installed: pip install {LLAMA_CPP}", file=sys.stderr)
    return False


def requantize(model, out, name):
    """Have llama.cpp write its own "Q4_0" or "Q8_0" version of a GGUF file to the path `out`."""
    lib = import_llama_cpp()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
    settings.allow_requantize = True  # from blocks of few bits, not from the original floats
    settings.nthread = num_threads()
    if lib.llama_model_quantize(str(resolve(model)).encode(), str(out).encode(), settings) != 0:
        raise InputError(f"llama.cpp cannot write {model} as {name} to {out}")


def num_threads():
    """As many as PyTorch and NumPy are told to use, or one a core."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())

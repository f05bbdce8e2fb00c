"""llama.cpp, as an engine to be measured beside ours; no requirement of minillm.

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

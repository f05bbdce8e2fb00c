"""Who runs the model: NumPy, or PyTorch on a CPU or a GPU?

A runner holds the weights where its backend wants them and takes token ids to logits. All that
differs between the backends outside the maths (arrays or tensors, dtype, device) is in this file;
what stands above it, generation and everything after, is written once.
"""

from __future__ import annotations

import warnings

import lazy_loader as lazy
import numpy as np

from .batching import PaddedCache, PaddedCacheTorch
from .errors import InputError
from .kernels import load_kernel
from .kernels.quantized_matmul import for_kernel
from .kv_cache import KVCache, KVCacheTorch
from .kv_cache_int8 import KVCacheInt8, KVCacheInt8Torch, PagedCacheInt8, PagedCacheInt8Torch
from .linear import Dense, PackedDense
from .loading.weights import load_weights
from .model import forward_np, forward_torch
from .paged_cache import PagedCache, PagedCacheTorch
from .quantized_linear import W8A8, for_cpu_operator
from .sampling import (
    best_tokens_np,
    best_tokens_torch,
    sample_np,
    sample_torch,
    top_logprobs_np,
    top_logprobs_torch,
)

torch = lazy.load("torch")


def make_runner(checkpoint, backend, device, dtype, kv_dtype="auto"):
    """The runner for `backend` "numpy" or "torch".   Raises InputError for any other."""
    if backend == "numpy":
        return NumpyRunner(checkpoint, device, dtype, kv_dtype)
    if backend == "torch":
        return TorchRunner(checkpoint, device, dtype, kv_dtype)
    raise InputError(f"backend {backend!r} is unknown: choose 'torch' or 'numpy'")


class NumpyRunner:
    """The reference: every step is the `_np` function, in float32."""

    backend = "numpy"

    def __init__(self, checkpoint, device="auto", dtype="auto", kv_dtype="auto"):
        if device not in ("auto", "cpu"):
            raise InputError(f"device {device!r} is not for NumPy: use 'cpu', or backend 'torch'")
        if dtype not in ("auto", "float32", "float64"):
            raise InputError(f"dtype {dtype!r} is not for NumPy: choose 'float32' or 'float64', "
                             "or use backend 'torch'")
        self.device = "cpu"
        self.dtype = "float32" if dtype == "auto" else dtype
        self.kv_dtype = choose_kv_dtype(kv_dtype, self.dtype)
        self.weights = load_weights(checkpoint, self._convert, self._convert_matrix)

    def _convert(self, array):
        return array.astype(self.dtype, copy=False)

    def _convert_matrix(self, matrix, has_rows):
        if isinstance(matrix, Dense):
            return matrix.converted(self._convert)
        return matrix.converted(np.asarray, self._convert, np.dtype(self.dtype))

    def new_cache(self, capacity):
        if self.kv_dtype == "int8":
            return KVCacheInt8(self.weights.config, capacity, self.dtype)
        return KVCache(self.weights.config, capacity, self.dtype)

    def new_padded_cache(self, num_padding, capacity):
        return PaddedCache(self.weights.config, num_padding, capacity, self.dtype)

    def new_paged_cache(self, num_blocks, block_size):
        cache = PagedCacheInt8 if self.kv_dtype == "int8" else PagedCache
        return cache(self.weights.config, num_blocks, block_size, self.dtype)

    def forward(self, tokens, positions, cache, rows=None):
        """tokens, positions: lists of N ints; rows: as in forward_np  ->  logits [R, V]."""
        return forward_np(self.weights, np.asarray(tokens), np.asarray(positions), cache, rows)

    def forward_batch(self, batch, paged_cache):
        """A step of the engine; see scheduler.Batch   ->  logits [R, V] of its rows."""
        cache = paged_cache.step(batch.spans)
        return self.forward(batch.tokens, batch.positions, cache, batch.rows)

    sample = staticmethod(sample_np)
    best_tokens = staticmethod(best_tokens_np)
    top_logprobs = staticmethod(top_logprobs_np)

    def to_numpy(self, logits):
        return logits.astype(np.float32)


class TorchRunner:
    """Every step is the `_torch` function, on `device`, in float32, bfloat16 or float16."""

    backend = "torch"

    def __init__(self, checkpoint, device="auto", dtype="auto", kv_dtype="auto"):
        self.torch_device = choose_device(device)
        is_quantized = checkpoint.quantize is not None
        self.torch_dtype = choose_dtype(dtype, self.torch_device, is_quantized)
        self.device = str(self.torch_device)
        self.dtype = str(self.torch_dtype).removeprefix("torch.")
        self.kv_dtype = choose_kv_dtype(kv_dtype, self.dtype)
        self.pads_batches = self.torch_device.type == "cuda"
        self.slow_shapes = set()  # of quantized matrices that no fast operator takes
        self.weights = load_weights(checkpoint, self._convert, self._convert_matrix)
        self._warn_of_slow_shapes()
        self.weights.inv_freq = torch.from_numpy(self.weights.inv_freq).to(self.torch_device)
        if self.dtype == "bfloat16" and self.device == "cpu" and has_onednn_bfloat16():
            self.weights.replace_layer_matrices(PackedDense)

    def _convert(self, array):
        return self._move(array).to(self.torch_dtype)

    def _move(self, array):
        # A memory-mapped array is read-only, and torch wants to be told that nobody will write.
        array = array if array.flags.writeable else array.copy()
        return torch.from_numpy(array).to(self.torch_device)

    def _convert_matrix(self, matrix, has_rows):
        if isinstance(matrix, Dense):
            return matrix.converted(self._convert)
        matrix = matrix.converted(self._move, self._convert, self.torch_dtype)
        fast = for_kernel(matrix) if self.device == "cpu" else None
        if fast is None and (isinstance(matrix, W8A8) or self.dtype == "bfloat16"):
            fast = for_cpu_operator(matrix, has_rows) if self.device == "cpu" else None
        if fast is None:
            self.slow_shapes.add(matrix.shape)
        return fast or matrix

    def _warn_of_slow_shapes(self):
        if self.slow_shapes:
            shapes = ", ".join(map(str, sorted(self.slow_shapes)))
            warnings.warn(f"no fast operator multiplies quantized matrices of {shapes} in "
                          f"{self.dtype} on {self.device}: they are turned into floats at every "
                          "use, which is slow", stacklevel=4)

    def new_cache(self, capacity):
        if self.kv_dtype == "int8":
            return KVCacheInt8Torch(self.weights.config, capacity, self.torch_dtype,
                                    self.torch_device)
        return KVCacheTorch(self.weights.config, capacity, self.torch_dtype, self.torch_device)

    def new_padded_cache(self, num_padding, capacity):
        return PaddedCacheTorch(self.weights.config, num_padding, capacity, self.torch_dtype,
                                self.torch_device)

    def new_paged_cache(self, num_blocks, block_size):
        cache = PagedCacheInt8Torch if self.kv_dtype == "int8" else PagedCacheTorch
        return cache(self.weights.config, num_blocks, block_size, self.torch_dtype,
                     self.torch_device)

    def forward(self, tokens, positions, cache, rows=None):
        """Same contract as NumpyRunner.forward."""
        with torch.inference_mode():
            tokens = torch.tensor(tokens, device=self.torch_device)
            positions = torch.tensor(positions, device=self.torch_device)
            return forward_torch(self.weights, tokens, positions, cache, rows)

    def forward_batch(self, batch, paged_cache):
        """Same contract as NumpyRunner.forward_batch. On a GPU a step that only decodes has one of
        few sizes, so that a CUDA graph could be captured for each."""
        if self.pads_batches and len(batch.tokens) == len(batch.spans):
            batch = batch.padded(batch_bucket(len(batch.tokens)))
        cache = paged_cache.step(batch.spans)
        return self.forward(batch.tokens, batch.positions, cache, batch.rows)

    def best_tokens(self, logits):
        """best_tokens_torch; on a CPU through NumPy, whose argmax takes a tenth of the time."""
        if self.device == "cpu":
            return best_tokens_np(logits.float().numpy())
        return best_tokens_torch(logits)

    sample = staticmethod(sample_torch)
    top_logprobs = staticmethod(top_logprobs_torch)

    def to_numpy(self, logits):
        return logits.float().cpu().numpy()


def batch_bucket(num_rows):
    """The size that a decode step of num_rows is padded to: 1, 2, 4, 8 and then multiples of 8.

    >>> [batch_bucket(num_rows) for num_rows in (1, 3, 8, 9, 30)]
    [1, 4, 8, 16, 32]
    """
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def choose_device(device):
    """"auto" is the first GPU if there is one.   Raises InputError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device) if isinstance(device, str) else None
    except RuntimeError:
        chosen = None
    if chosen is None or not (chosen.type == "cuda" or str(chosen) == "cpu"):
        raise InputError(f"device {device!r} is unknown: choose 'auto', 'cpu', 'cuda' or 'cuda:N'")
    num_gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        raise InputError(f"device {device!r} is not there: PyTorch sees {num_gpus} CUDA devices; "
                         "use device 'cpu' or 'auto'")
    return chosen


def choose_dtype(dtype, device, is_quantized=False):
    """"auto" is bfloat16 wherever the hardware multiplies it, and float32 elsewhere.

    Quantized weights on a CPU: float32 for our own kernel; PyTorch's operators want bfloat16.
    """
    if dtype == "auto" and is_quantized and device.type == "cpu":
        return torch.bfloat16 if load_kernel("quantized_matmul") is None else torch.float32
    if dtype == "auto":
        fast = device.type == "cuda" or has_onednn_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise InputError(f"dtype {dtype!r} is unknown: choose 'auto' or one of {', '.join(known)}")
    return known[dtype]


def choose_kv_dtype(kv_dtype, dtype):
    """"auto" keeps keys and values in the dtype of the model."""
    if kv_dtype not in ("auto", "int8"):
        raise InputError(f"kv_dtype {kv_dtype!r} is unknown: choose 'auto', the dtype of the "
                         "model, or 'int8'")
    return dtype if kv_dtype == "auto" else kv_dtype


def has_onednn_bfloat16():
    """True if PyTorch's CPU library, oneDNN, is there and this CPU can run its bfloat16 kernels."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

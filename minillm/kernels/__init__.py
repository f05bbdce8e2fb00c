"""Our own kernels in C: where PyTorch has no operator, or a slow one.

A kernel is compiled when it is first wanted, for the CPU that it runs on, and kept in the user's
cache. It needs a C compiler with OpenMP; without one, or on another CPU, PyTorch's operators do the
same work more slowly. Every kernel has a NumPy and a PyTorch function that states what it computes.
A process that has run one must not be forked: the threads would not be there.
Chapter 11_quantization tells the story.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
DECODE_OPS = {  # the functions of decode_ops.c
    "rms_norm": (POINTER, POINTER, FLOAT, POINTER, INT, INT),
    "rope": (POINTER, POINTER, POINTER, POINTER, INT, INT, INT, INT),
}


@functools.cache
def load_kernel(name):
    """The compiled NAME.c of this folder, as a ctypes library; None where it cannot be compiled.

    PyTorch must have been imported: the kernel then runs on its OpenMP threads, and not on as many
    more, which would fight with them for the cores.
    """
    source = Path(__file__).with_name(f"{name}.c")
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        key = hashlib.sha256(source.read_bytes() + repr((compiler, FLAGS, cpu_flags())).encode())
        target = cache_folder() / f"{name}-{key.hexdigest()[:16]}.so"
        if not target.is_file():
            compile_kernel([*compiler, *FLAGS], source, target)
        return ctypes.CDLL(str(target))
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        # No compiler, a CC that is no command, another CPU, no home folder, or a read-only one.
        if "avx512_vnni" in cpu_flags():
            warnings.warn(f"{source.name} cannot be compiled ({error}): PyTorch's operators are "
                          "used, which are slower; a C compiler with OpenMP, named by CC, helps",
                          stacklevel=2)
        return None


@functools.cache
def decode_op(name):
    """A function of decode_ops.c, or None where there is no such kernel."""
    library = load_kernel("decode_ops")
    if library is None:
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = DECODE_OPS[name], None
    return function


def is_plain_float32(x):
    """True for a tensor that decode_ops.c takes: on a CPU, no gradient is to flow through it."""
    return (x.is_cpu and x.element_size() == 4 and x.is_floating_point() and not x.requires_grad)


def compile_kernel(command, source, target):
    """Compile into a private file, and give it its name when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        out = Path(folder) / target.name
        subprocess.run([*command, str(source), "-lm", "-o", str(out)], check=True, timeout=120,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.replace(out, target)


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm" / "kernels"


def cpu_flags():
    """What -march=native depends on: a home folder may be shared by unequal machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")  # ARM

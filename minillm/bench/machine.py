"""What was this measured on, and how fast can that machine be at all?"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from pathlib import Path

import numpy as np

PACKAGES = ("minillm", "numpy", "torch", "transformers", "tokenizers", "llama-cpp-python")


def describe_machine():
    """The machine, the versions and the commit, as they go into a result's JSON."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_model():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(name):
    if name == "minillm":  # also where it runs from a checkout and is not installed
        from minillm import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit():
    """The commit measured, with "+changes" if the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "--short=12", "HEAD"],
                                capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "-C", here, "status", "--porcelain", "--", "*.py"],
                                 capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def read_bandwidth(num_bytes=2**30, repeats=5):
    """Bytes/s at which all cores together read memory: the best of a few sums over a big array."""
    import torch

    array = torch.ones(num_bytes // 4)
    return num_bytes / min(seconds(array.sum) for _ in range(repeats))


def flops(dtype, size=2048, repeats=5):
    """FLOP/s of a square matrix product in torch, the best of a few; dtype: "float32", ..."""
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(repeats))


def int8_ops(size=2048, repeats=5):
    """Operations/s of a square product of signed bytes, which are summed in int32, in torch."""
    import torch

    a = torch.ones(size, size, dtype=torch.int8)
    return 2 * size**3 / min(seconds(lambda: torch._int_mm(a, a)) for _ in range(repeats))


def flops_numpy(size=2048, repeats=5):
    """The same in NumPy, whose BLAS is another library."""
    a = np.ones((size, size), dtype=np.float32)
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(repeats))


def peak_memory_bytes():
    """The most memory that this process had resident at a time, with its libraries and the pages
    of mapped files that it touched. Where there is no /proc: what getrusage says."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if platform.system() == "Darwin" else 1024 * largest


def seconds(function):
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s

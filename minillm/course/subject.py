"""A student's function, as a grader sees it: its calls counted, its inputs watched.

A check calls its subject with NumPy arrays. Where the student handed in a PyTorch twin, the same
check runs once more on a subject that turns arrays into tensors on the way in, and back on the way
out. A class is a subject too: its objects are watched through every method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys

import numpy as np

from .check import CheckFailed


class Unfilled(Exception):
    """The student's function still raises NotImplementedError."""


class Subject:
    """Called like the student's function or class.   calls: how often it was."""

    def __init__(self, name, thing, is_twin=False):
        self.name, self.thing, self.is_twin = name, thing, is_twin
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.is_twin and "device" in _parameters(self.thing):
            kwargs.setdefault("device", "cpu")
        result = self.watch(self.name, self.thing, args, kwargs)
        return Watched(self, result) if inspect.isclass(self.thing) else result

    def watch(self, name, function, args, kwargs):
        """Call the function, and see to it that it leaves its arguments alone."""
        before = [fingerprint(value) for value in (*args, *kwargs.values())]
        try:
            if self.is_twin:
                result = to_arrays(function(*to_tensors(args), **to_tensors(kwargs)))
            else:
                result = function(*args, **kwargs)
        except NotImplementedError as error:
            raise Unfilled(name) from error
        after = [fingerprint(value) for value in (*args, *kwargs.values())]
        for i, (old, new) in enumerate(zip(before, after)):
            if old != new:
                names = [*_parameters(function)[: len(args)], *kwargs]
                which = f"`{names[i]}`" if i < len(names) else f"number {i + 1}"
                raise CheckFailed(
                    f"{name} to leave its inputs as they were", f"input {which} is changed",
                    "an operation in place, such as `x /= 2` or `x[0] = 1`, changes the caller's "
                    "data too: write `x = x / 2`, or work on a copy")
        return result


class Watched:
    """An object of a student's class, watched through its methods."""

    def __init__(self, subject, thing):
        self.__dict__.update(_subject=subject, _thing=thing)

    def __setattr__(self, name, value):
        setattr(self._thing, name, value)

    def __getattr__(self, name):
        full_name = f"{self._subject.name}.{name}"
        try:
            value = getattr(self._thing, name)
        except NotImplementedError as error:  # a property
            raise Unfilled(full_name) from error
        if not callable(value):
            return to_arrays(value) if self._subject.is_twin else value
        return lambda *args, **kwargs: self._subject.watch(full_name, value, args, kwargs)


def _parameters(function):
    return list(inspect.signature(function).parameters)


def fingerprint(value):
    """Something that differs if the value was changed; None for what may change (a cache)."""
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)  # a digest: a copy would count in peak_bytes
        return value.shape, str(value.dtype), hashlib.sha256(data).digest()
    if isinstance(value, (list, tuple)):
        return tuple(map(fingerprint, value))
    if isinstance(value, dict):
        return tuple((key, fingerprint(entry)) for key, entry in value.items())
    if isinstance(value, set):
        return frozenset(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(fingerprint(entry) for entry in vars(value).values())
    if isinstance(value, float):
        return repr(value)  # NaN is not equal to itself
    return value if isinstance(value, (int, str, bytes)) else None


def to_tensors(value):
    """Arrays (also in lists, dicts and dataclasses) as tensors, NumPy's types as PyTorch's."""
    import torch

    def leaf(value):
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value)  # the same memory: a change in place is noticed
        if isinstance(value, type) and issubclass(value, np.generic):
            return getattr(torch, np.dtype(value).name)
        return value

    return _convert(value, leaf)


def to_arrays(value):
    def leaf(value):
        is_tensor = "torch" in sys.modules and type(value).__module__.partition(".")[0] == "torch"
        return value.detach().numpy() if is_tensor and hasattr(value, "detach") else value

    return _convert(value, leaf)


def _convert(value, leaf):
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_convert(entry, leaf) for entry in value)
    if type(value) is dict:
        return {key: _convert(entry, leaf) for key, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {name: _convert(entry, leaf) for name, entry in old.items()}
        changed = {name: entry for name, entry in new.items() if entry is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return leaf(value)

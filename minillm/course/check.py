"""What graders are written with: a check, and ways to say what is wrong.

    @check("the scores are divided by √D")
    def scaled(attention_np):                       # the student's, called with NumPy arrays
        q, k, v = random_qkv(H=1, K=1, T=1, S=5, D=4)
        close(attention_np(q, k, v), loop(q, k, v),
              mistakes={"the scores are not divided by √D": loop(q, k, v, scale=1.0)})

A check's parameters name the functions that it tests. It fails by raising CheckFailed, which the
functions below do, with what was expected, what came, and the likeliest mistake. `mistakes` maps
a symptom to what a function with that mistake returns: if that is what came, it is named.
How to write a grader is told in tests/exercises/README.md.
"""

from __future__ import annotations

import inspect
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import numpy as np


class CheckFailed(AssertionError):
    """The student's function is wrong: what was expected, what came, the likeliest mistake.

    general_hint: what to say where neither the comparison nor the check knows better.
    """

    def __init__(self, expected, got, hint=None, general_hint=None):
        super().__init__(f"expected {expected}, got {got}" + (f": {hint}" if hint else ""))
        self.expected, self.got = str(expected), str(got)
        self.hint, self.general_hint = hint, general_hint


@dataclass(frozen=True)
class Check:
    """One thing that a grader looks at.   subjects: the names of the functions that it tests."""

    title: str
    hint: str | None
    twin: bool
    function: Callable

    @property
    def subjects(self):
        return tuple(inspect.signature(self.function).parameters)


def check(title, hint=None, twin=True):
    """Make a function a check.

    hint: what is likely wrong where the failure itself does not know.   twin: whether the PyTorch
    form, if one is handed in, is to pass it too (False where NumPy's own memory is counted).
    """
    def mark(function):
        function.check = Check(title, hint, twin, function)
        return function

    return mark


def checks_of(grader):
    """The checks of a grader's module, in the order in which they stand there."""
    return [thing.check for thing in vars(grader).values()
            if type(thing) is FunctionType and hasattr(thing, "check")]


def close(got, expected, tolerance=1e-6, hint=None, mistakes=None):
    """Every entry of `got` is within tolerance of `expected`, relative to its largest entry."""
    expected = np.asarray(expected, dtype=np.float64)
    got = as_array(got, f"an array of shape {expected.shape}", hint)
    if got.shape != expected.shape:
        raise CheckFailed(f"an array of shape {expected.shape}", f"one of shape {got.shape}", hint,
                          "an axis is missing, added, or at another place")
    differs = ~_is_close(got, expected, tolerance)
    if not differs.any():
        return
    index = tuple(map(int, np.argwhere(differs)[0]))
    where = f" at {list(index)}" if index else ""
    raise CheckFailed(
        f"{expected[index]:.6g}{where}",
        f"{got[index]:.6g}{where} ({differs.sum()} of {differs.size} numbers differ by more than "
        f"{tolerance:g})",
        _symptom(got, mistakes, lambda wrong: _same_array(got, wrong, tolerance)) or hint,
        "NaN comes from ∞ − ∞, 0·∞ or 0/0" if np.isnan(got).any() else None)


def equal(got, expected, hint=None, mistakes=None):
    """`got` equals `expected`: ids, lists, strings, counters. NumPy's integers count as integers,
    and a tuple or an array as a list."""
    if _plain(got) != _plain(expected):
        raise CheckFailed(_short(expected), _short(got), _symptom(
            got, mistakes, lambda wrong: _plain(got) == _plain(wrong)) or hint)


def require(condition, expected, got, hint=None):
    """Whatever else has to hold; `expected` and `got` are words."""
    if not condition:
        raise CheckFailed(expected, got, hint)


def raises(error_type, function, *args, hint=None, **kwargs):
    """function(*args) raises error_type."""
    try:
        got = function(*args, **kwargs)
    except error_type:
        return
    raise CheckFailed(f"a {error_type.__name__}", _short(got), hint)


def peak_bytes(function, *args, **kwargs):
    """The most memory that NumPy and Python held beyond what was there before: a counter, and so
    the same on every machine."""
    tracemalloc.start()
    try:
        function(*args, **kwargs)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def as_array(value, expected, hint=None):
    """`value` as float64, or CheckFailed if it is nothing of the kind."""
    if value is None:
        raise CheckFailed(expected, "None", "the function returns nothing: is a `return` missing?")
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise CheckFailed(expected, f"a {type(value).__name__}, {_short(value)}", hint) from None


def _is_close(got, expected, tolerance):
    finite = expected[np.isfinite(expected)]
    scale = max(1.0, float(np.abs(finite).max(initial=0.0)))
    return np.isclose(got, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def _same_array(got, wrong, tolerance):
    wrong = np.asarray(wrong, dtype=np.float64)
    return got.shape == wrong.shape and _is_close(got, wrong, tolerance).all()


def _symptom(got, mistakes, is_same):
    """The first of `mistakes` that would have given the same answer."""
    return next((text for text, wrong in (mistakes or {}).items() if is_same(wrong)), None)


def _plain(value):
    """Without NumPy, and with lists for tuples, so that == says what a student means by it."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {_plain(key) if not isinstance(key, tuple) else key: _plain(entry)
                for key, entry in value.items()}
    return value


def _short(value, limit=120):
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"

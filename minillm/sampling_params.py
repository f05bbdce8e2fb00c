"""What may a caller ask of the sampler? Names, defaults and bounds are vLLM's, except where a
comment says otherwise.

Chapter 06_sampling tells the story; `sampling.py` holds the maths. Left out on purpose: beam
search, structured output, and anything else that is not a number, a string or a token id.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from reprlib import repr as short_repr  # cut, so that a message stays one readable line

import numpy as np

from .errors import InputError

GREEDY_BELOW = 1e-5  # a temperature this low would only pick the best token the slow way
MAX_NUM_STOP = 16
MAX_N = 64  # each completion owns a KV cache, so vLLM's 16384 could claim a machine's memory
MAX_LOGIT_BIAS = 100.0  # OpenAI's: e^100 forces a token, e^-100 forbids it

_TINY, _HUGE = math.ulp(0.0), sys.float_info.max  # "above 0" and "finite" as inclusive bounds

_LIMITS = {  # name: (type, lowest, highest, the rule and the way out)
    "temperature": (float, 0.0, _HUGE, "a finite number of at least 0 (0 is greedy)"),
    "top_k": (int, -1, math.inf, "an integer of at least 1, or 0 to switch it off"),
    "top_p": (float, _TINY, 1.0, "a number above 0 and at most 1 (1 switches it off)"),
    "min_p": (float, 0.0, 1.0, "a number from 0 to 1 (0 switches it off)"),
    # vLLM allows any above 0; beyond these bounds a logit can overflow.
    "repetition_penalty": (float, 1e-3, 1e3, "a number from 0.001 to 1000 (1 switches it off)"),
    "presence_penalty": (float, -2.0, 2.0, "a number from -2 to 2 (0 switches it off)"),
    "frequency_penalty": (float, -2.0, 2.0, "a number from -2 to 2 (0 switches it off)"),
    "seed": (int, 0, 2**64 - 1, "an integer from 0 to 2**64 - 1, or None for fresh randomness"),
    "max_tokens": (int, 1, math.inf, "an integer of at least 1"),
    "min_tokens": (int, 0, math.inf, "an integer of at least 0 (0 switches it off)"),
    "logprobs": (int, 0, 20, "an integer from 0 to 20, or None to switch it off"),
    "n": (int, 1, MAX_N, f"an integer from 1 to {MAX_N} (for more, send more requests)"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. Raises InputError for any value that is
    out of bounds or of the wrong type; a bool is not a number here. Another name of a parameter
    is a TypeError.

    >>> SamplingParams(temperature=0.7, top_p=0.9, stop="###").stop
    ('###',)
    >>> SamplingParams(min_p=2)
    Traceback (most recent call last):
    minillm.errors.InputError: min_p is 2, must be a number from 0 to 1 (0 switches it off)
    """

    temperature: float = 1.0  # below 1 sharpens, above 1 flattens, 0 takes the best token
    top_k: int = 0  # keep the k best tokens; 0 or -1: off
    top_p: float = 1.0  # keep the fewest tokens that together have this probability
    min_p: float = 0.0  # keep tokens at least this likely, relative to the best
    repetition_penalty: float = 1.0  # above 1: less of what the prompt or the output has
    presence_penalty: float = 0.0  # subtracted once from the logit of what the output has
    frequency_penalty: float = 0.0  # subtracted once for each time that the output has it
    logit_bias: dict[int, float] | None = None  # token id -> addend, clamped to ±100
    stop: str | list[str] | None = None  # text that ends the output; kept as a tuple
    seed: int | None = None  # same seed, same text; None: fresh randomness
    max_tokens: int = 64  # a short paragraph; vLLM's 16 would end in mid-sentence
    min_tokens: int = 0  # no end of text before this many tokens
    ignore_eos: bool = False  # go on to max_tokens whatever the model says
    logprobs: int | None = None  # report this many best tokens beside the chosen one; at most 20
    n: int = 1  # completions for one prompt

    def __post_init__(self):
        for name in _LIMITS:
            if not (name in ("seed", "logprobs") and getattr(self, name) is None):
                object.__setattr__(self, name, _checked_number(name, getattr(self, name)))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "logit_bias", _checked_logit_bias(self.logit_bias))
        if not isinstance(self.ignore_eos, (bool, np.bool_)):
            raise InputError(f"ignore_eos is {short_repr(self.ignore_eos)}, must be True or False")
        object.__setattr__(self, "ignore_eos", bool(self.ignore_eos))
        if self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, must be at most max_tokens, which "
                             f"is {self.max_tokens}: lower the one or raise the other")
        if self.is_greedy and self.n > 1:
            raise InputError(f"n is {self.n}, must be 1 at temperature 0, where all completions "
                             "are the same: set n=1 or raise the temperature")

    @property
    def is_greedy(self) -> bool:
        """True if the best token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    def takes_best_token(self, num_output_tokens: int) -> bool:
        """True if the next token is the one with the largest logit, and nothing can change that."""
        return (self.is_greedy and not self.logit_bias and self.repetition_penalty == 1
                and not self.presence_penalty and not self.frequency_penalty
                and num_output_tokens >= self.min_tokens)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InputError if logit_bias names a token that a model of this size lacks."""
        for token in self.logit_bias or ():
            if token >= vocab_size:
                raise InputError(f"logit_bias names token {token}, must be a token id below the "
                                 f"vocabulary size {vocab_size}: remove it")


def _checked_number(name: str, value) -> int | float:
    """value as a Python number, if it is of the right type and in bounds."""
    kind, lowest, highest, rule = _LIMITS[name]
    is_number = isinstance(value, Integral if kind is int else Real)
    try:
        number = kind(value) if is_number and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond the largest float
        number = math.nan
    if not lowest <= number <= highest:  # NaN fails every comparison
        raise InputError(f"{name} is {short_repr(value)}, must be {rule}")
    return number


def _checked_stop(stop) -> tuple[str, ...]:
    """One string, several or None -> a tuple of strings, none of them empty."""
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)):
        raise InputError(f"stop is {short_repr(stop)}, must be a string, a list of strings or None")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InputError(f"stop has {short_repr(string)}, must have strings of at least one "
                             "character: remove it")
    if len(strings) > MAX_NUM_STOP:
        raise InputError(f"stop has {len(strings)} strings, must have at most {MAX_NUM_STOP}: "
                         "remove some")
    return tuple(strings)


def _checked_logit_bias(logit_bias) -> dict[int, float] | None:
    """Keys become integers (JSON has only strings for keys), values are clamped to ±100."""
    if logit_bias is None:
        return None
    if not isinstance(logit_bias, dict):
        raise InputError(f"logit_bias is {short_repr(logit_bias)}, must be a dict of token id -> "
                         "bias, or None")
    checked = {}
    for key, bias in logit_bias.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
        is_integer = isinstance(key, Integral) and not isinstance(key, bool)
        if not (is_digits and len(key) < 20 or is_integer and key >= 0):
            raise InputError(f"logit_bias names token {short_repr(key)}, must be a token id of at "
                             "least 0: remove it")
        token = int(key)
        if token in checked:
            raise InputError(f"logit_bias names token {token} twice, must name it once: remove one")
        is_number = isinstance(bias, Real) and not isinstance(bias, bool)
        if not is_number or not -math.inf < bias < math.inf:
            raise InputError(f"logit_bias of token {token} is {short_repr(bias)}, must be a finite "
                             f"number (it is clamped to ±{MAX_LOGIT_BIAS:g})")
        checked[token] = float(min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, bias)))
    return checked

"""What is asked of an engine that serves many, and when? Lengths, texts and arrivals.

Real requests are unequal: most are short, and a few are long. Here both lengths are drawn from a
log-normal distribution, which has such a tail, like the lengths in ShareGPT (Kwon et al. 2023,
Fig. 11), but a fraction of their mean, so that two cores serve a run in a minute. The gaps between
arrivals are drawn from a gamma distribution, as in `vllm bench serve`; with shape 1 the arrivals
are a Poisson process. Chapter 10_continuous_batching uses them. Left out: conversations, in which a
request waits for the answer to another.

Everything is drawn from a seed and nothing else, so that all contestants are asked the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ..loading.registry import fetch, resolve

MODEL = "smollm2-135m-instruct"
TEXT = "macbeth"


@dataclass(frozen=True)
class Lengths:
    """exp of a normal distribution, rounded and clipped.

    median: tokens   sigma: of the logarithm; 1 means that one in six is longer than e · median
    shortest, longest: tokens; what lies beyond becomes these
    """

    median: float
    sigma: float
    shortest: int
    longest: int

    def draw(self, rng, num):
        """-> a list of num ints."""
        lengths = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(num)))
        return lengths.clip(self.shortest, self.longest).astype(int).tolist()


PROMPT_LENGTHS = Lengths(median=48, sigma=1.0, shortest=4, longest=1024)
ANSWER_LENGTHS = Lengths(median=24, sigma=1.0, shortest=2, longest=192)
FAST_LENGTHS = Lengths(median=6, sigma=0.5, shortest=2, longest=12)


def draw_lengths(num_requests, prompt_lengths, answer_lengths, seed=0):
    """-> tokens of every prompt, tokens of every answer: two lists of ints."""
    rng = np.random.default_rng(seed)
    return prompt_lengths.draw(rng, num_requests), answer_lengths.draw(rng, num_requests)


def describe_lengths(prompt_lengths, answer_lengths):
    """For a result's arguments."""
    return {"prompt": dataclasses.asdict(prompt_lengths),
            "answer": dataclasses.asdict(answer_lengths)}


def read_text():
    """All of the text, in the model's tokens."""
    from ..loading import open_checkpoint

    tokenizer = open_checkpoint(resolve(MODEL)).tokenizer()
    return tokenizer.encode(fetch(TEXT).read_text(encoding="utf-8"))


def cut_prompts(text_token_ids, lengths):
    """One piece of the text after the other, of these lengths; at its end it begins again.

    >>> cut_prompts([7, 8, 9], [2, 2, 1])
    [[7, 8], [9, 7], [8]]
    """
    endless = np.resize(text_token_ids, sum(lengths)).tolist()
    ends = list(accumulate(lengths))
    return [endless[end - length : end] for length, end in zip(lengths, ends)]


def arrival_times(num_requests, rate, burstiness=1.0, seed=0):
    """When each request comes, in seconds from the start, in order; the first comes at 0.

    rate: requests/s, on average.   burstiness: b of the gaps, Gamma(shape b, scale 1/(rate·b)); 1
    is Poisson, less is burstier. Another rate stretches the same pattern.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1 / burstiness, num_requests - 1)
    return [0.0, *(np.cumsum(gaps) / rate).tolist()]


def pack(numbers, digits=5):
    """Numbers as one string, which in a JSON file is one line instead of thousands; what is no
    whole number is rounded to so many digits.

    >>> pack([3, 0.25, 0.123456])
    '3 0.25 0.12346'
    """
    return " ".join(str(number) if isinstance(number, int)
                    else f"{number:.{digits}f}".rstrip("0").rstrip(".") for number in numbers)


def unpack(text):
    """The numbers again, as an array of floats.

    >>> unpack("3 0.25")
    array([3.  , 0.25])
    """
    return np.array(text.split(), dtype=float)

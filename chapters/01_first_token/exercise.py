"""Exercise of chapter 01_first_token: write request_metrics.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 01
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/01_first_token/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own.
"""

from __future__ import annotations

from minillm.metrics import RequestMetrics


def request_metrics(submitted_s, token_times_s, num_prompt_tokens=0, num_cached_tokens=0):
    """Metrics of one request from its clock: when it was submitted, and when each token came.

    submitted_s: seconds; token_times_s: a list of seconds on the same clock, one a token, in order.
    The clock starts anywhere, so only differences mean something. Returns RequestMetrics(
    num_prompt_tokens, num_cached_tokens, num_output_tokens, ttft_ms, itl_ms, tpot_ms, e2e_ms):
    the first two as they are given, the tokens that came, and durations in milliseconds.

        ttft_ms   from submission to the first token; None if none came
        itl_ms    a list: the gap before each token after the first; [] for fewer than two tokens
        tpot_ms   (e2e_ms − ttft_ms) / (tokens − 1); None for fewer than two tokens
        e2e_ms    from submission to the last token; None if none came

    >>> m = request_metrics(10.0, [10.5, 10.6, 10.9])
    >>> [round(ms) for ms in (m.ttft_ms, *m.itl_ms, m.tpot_ms, m.e2e_ms)]
    [500, 100, 300, 200, 900]
    """
    raise NotImplementedError("request_metrics is yours to write")

"""How is the speed of an answer measured?

The definitions are those of `vllm bench serve`, AIPerf and MLPerf Inference. Chapter
01_first_token tells the story; percentiles and goodput over many requests come with serving.
"""

from __future__ import annotations

from dataclasses import dataclass

from .exercise import exercise


@dataclass(frozen=True)
class RequestMetrics:
    """What one request experienced; all durations in milliseconds.

    ttft_ms: from submission to the first token; None if none came.
    itl_ms: inter-token latencies, the gap before each token after the first.
    tpot_ms: time per output token after the first, (e2e − ttft) / (tokens − 1); None for one token.
    e2e_ms: from submission to the last token.
    num_cached_tokens: prompt tokens whose keys and values were there already.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_ms: float | None
    itl_ms: list[float]
    tpot_ms: float | None
    e2e_ms: float | None

    @property
    def decode_tokens_per_s(self):
        """Speed of the tokens after the first; None for fewer than two."""
        return 1000 / self.tpot_ms if self.tpot_ms else None


@exercise("01_first_token")
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
    since_ms = [1000 * (time_s - submitted_s) for time_s in token_times_s]
    gaps_ms = [later - sooner for sooner, later in zip(since_ms, since_ms[1:])]
    return RequestMetrics(
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=len(since_ms),
        ttft_ms=since_ms[0] if since_ms else None,
        itl_ms=gaps_ms,
        tpot_ms=(since_ms[-1] - since_ms[0]) / len(gaps_ms) if gaps_ms else None,
        e2e_ms=since_ms[-1] if since_ms else None,
    )

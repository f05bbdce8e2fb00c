"""What does a compression cost in quality? Perplexity on real text, and KL divergence.

Both are teacher-forced: the model reads a text, and is asked at every position how likely it
thought the token that really came next. Perplexity needs that one number. KL divergence compares
the whole distribution with that of a reference, so it sees a change long before perplexity does,
whose two errors (a word made likelier here, another less likely there) cancel.

The text is cut into windows that do not overlap. A window's first token is context only, every
other one is scored, as in Hugging Face's guide "Perplexity of fixed-length models" with a stride of
the window's length; llama.cpp scores the second half of each window alone, and so gets a lower
perplexity from the same model. Windows go through a KV cache in chunks, the way a prompt does:
what an int8 cache costs is measured as well. How many tokens a chunk has may decide which kernel
multiplies (few: the ones that decode), and so, a little, the result: `chunk_size` is a part of what
is measured. Chapter 11_quantization tells the story.

Every ± is a standard error, the sample's standard deviation divided by √n, as in llama.cpp's
`perplexity --kl-divergence`. It takes the n tokens for independent draws, and they are not: a list
of names, a song, a scene is hard or easy as a whole. What another part of the same text would give
may differ by several times as much, and of other texts it says nothing. Compare models on the same
tokens, where most of that cancels (`perplexity_ratio`).

Left out: tasks with right and wrong answers, and texts that the model writes itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import lazy_loader as lazy
import numpy as np
from tqdm import tqdm

from .errors import InputError
from .generate import PREFILL_CHUNK

torch = lazy.load("torch")

WINDOW = 512  # tokens; enough context for a fair judgement, and one chunk of prefill
SCORED_ROWS = 16  # of logits at a time in float64: 6 MB where V is 49 152, which a cache can hold


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text. NLL: −ln p(token | the window before it), in nats.

    perplexity = exp(mean NLL): as unsure as when choosing among so many equally likely tokens.
    perplexity_se = perplexity · mean_nll_se, the first-order propagation through exp.
    bits_per_token = mean NLL / ln 2: what a perfect arithmetic coder would need.
    """

    num_scored_tokens: int
    mean_nll: float
    mean_nll_se: float
    perplexity: float
    perplexity_se: float
    bits_per_token: float


@dataclass(frozen=True)
class KLDResult:
    """How far a model's distributions are from those of a reference, at the same positions.

    kld: KL(P_ref ‖ Q) = Σ_v P_ref(v)·(ln P_ref(v) − ln Q(v)), in nats, over all V tokens; its mean
    with standard error, its median, its 99th percentile and its largest value.
    same_best: the share of positions at which both find the same token best (llama.cpp: "same top
    p"), with the standard error of a share.
    perplexity_ratio = exp(mean(NLL − NLL_ref)): the model's perplexity divided by the reference's.
    Its standard error comes from the differences token by token, and is much smaller than what the
    standard errors of the two perplexities suggest: both models find the same tokens hard.
    """

    num_scored_tokens: int
    mean_kld: float
    mean_kld_se: float
    median_kld: float
    p99_kld: float
    max_kld: float
    same_best: float
    same_best_se: float
    perplexity: float
    perplexity_se: float
    reference_perplexity: float
    reference_perplexity_se: float
    perplexity_ratio: float
    perplexity_ratio_se: float


def evaluate_perplexity(llm, token_ids, window=WINDOW, progress=False,
                        chunk_size=PREFILL_CHUNK):
    """Perplexity of token ids (a text, encoded) in windows of `window` tokens.

    A last window that is shorter counts as well. Where the model wants a token that begins a text,
    it takes the place of each window's first one (as in llama.cpp), which is not scored anyway.
    progress: show a bar on standard error.   chunk_size: tokens a forward pass.
    Raises InputError for a window below 2 or beyond the model's context, a chunk_size beyond
    PREFILL_CHUNK, a token id that the model does not have, or fewer than 2 tokens to score, and
    FloatingPointError for logits that are not finite.
    """
    check_sizes(llm, window, chunk_size)
    windows = split_windows(llm, token_ids, window)
    nll = []
    with progress_bar(windows, progress) as bar:
        for logits, targets in scored_rows(llm, windows, chunk_size):
            score = token_nll_np if isinstance(logits, np.ndarray) else token_nll_torch
            nll += score(logits, targets).tolist()
            bar.update(len(targets))
    return perplexity_of(np.array(nll))


def evaluate_kld(llm, reference, token_ids, window=WINDOW, progress=False,
                 chunk_size=PREFILL_CHUNK):
    """KL divergence of llm's distributions from those of `reference`, another LLM; -> KLDResult.

    Arguments, windows and errors are those of evaluate_perplexity. Both models take the same chunk
    in turn: no more than chunk_size rows of logits of each are there at a time. On one device
    PyTorch compares them; in all other cases NumPy does.
    Raises InputError also where the two have different vocabularies.
    """
    if llm.vocab_size != reference.vocab_size:
        raise InputError(f"{llm.model} has {llm.vocab_size} tokens and the reference "
                         f"{reference.model} has {reference.vocab_size}: compare models that have "
                         "the same tokenizer")
    for each in (llm, reference):
        check_sizes(each, window, chunk_size)
    windows = split_windows(llm, token_ids, window)
    on_torch = all(each.runner.backend == "torch" and each.runner.device == llm.runner.device
                   for each in (llm, reference))
    rows = []
    with progress_bar(windows, progress) as bar:
        for (logits, targets), (reference_logits, _) in zip(
                *(scored_rows(each, windows, chunk_size) for each in (llm, reference))):
            if on_torch:
                compared = compare_torch(logits, reference_logits, targets)
            else:
                compared = compare_np(as_numpy(llm, logits),
                                      as_numpy(reference, reference_logits), targets)
            rows += compared.tolist()
            bar.update(len(targets))
    return kld_of(*np.array(rows).T)


def split_windows(llm, token_ids, window):
    """-> lists of 2 to `window` token ids, one behind the other."""
    token_ids = llm.encode_prompt(token_ids)
    windows = [token_ids[start : start + window] for start in range(0, len(token_ids), window)]
    windows = [each for each in windows if len(each) > 1]
    if count_scored(windows) < 2:
        raise InputError(f"the text is too short: of its {len(token_ids)} tokens, windows of "
                         f"{window} leave {count_scored(windows)} to score, and 2 are the least "
                         "that have a standard error: give a longer text")
    if llm.tokenizer.add_bos_token:
        windows = [[llm.tokenizer.bos_token_id, *each[1:]] for each in windows]
    return windows


def check_sizes(llm, window, chunk_size):
    if not 2 <= window <= llm.context_len:
        raise InputError(f"window is {window}, must be from 2 to the {llm.context_len} tokens of "
                         f"{llm.model}'s context")
    if not 1 <= chunk_size <= PREFILL_CHUNK:
        raise InputError(f"the chunk is {chunk_size} tokens, must be from 1 to {PREFILL_CHUNK}")


def count_scored(windows):
    return sum(len(each) - 1 for each in windows)


def progress_bar(windows, progress):
    return tqdm(total=count_scored(windows), desc="evaluating", unit="token", disable=not progress)


def scored_rows(llm, windows, chunk_size):
    """Yields (logits [N, V], the N tokens that really came next), SCORED_ROWS at most at a time.

    A window's last token is not read: nothing is scored behind it.
    """
    cache = llm.runner.new_cache(max(len(each) for each in windows) - 1)
    for token_ids in windows:
        cache.truncate(0)
        for start in range(0, len(token_ids) - 1, chunk_size):
            end = min(start + chunk_size, len(token_ids) - 1)
            logits = llm.runner.forward(token_ids[start:end], list(range(start, end)), cache)
            for row in range(0, end - start, SCORED_ROWS):
                scored = logits[row : row + SCORED_ROWS, : llm.vocab_size]
                if not math.isfinite(float(scored.max()) - float(scored.min())):
                    raise FloatingPointError(f"logits of {llm.model} are not finite: its "
                                             f"arithmetic overflowed in {llm.runner.dtype}")
                targets = start + row + 1
                yield scored, token_ids[targets : targets + len(scored)]


def as_numpy(llm, logits):
    return logits if isinstance(logits, np.ndarray) else llm.runner.to_numpy(logits)


def log_softmax_np(logits):
    """ln(exp(logit) / Σ exp(logit)) by row; the best logit is moved to 0 so that no exp overflows.

    logits: [N, V], any float type  ->  [N, V] float64: differences of 1e-4 are to be summed up
    over 49 152 tokens.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def log_softmax_torch(logits):
    """Same contract as log_softmax_np."""
    shifted = logits.to(torch.float64) - logits.amax(dim=1, keepdim=True)
    return shifted - torch.log(torch.exp(shifted).sum(dim=1, keepdim=True))


def token_nll_np(logits, targets):
    """−ln p(target) by row.   logits: [N, V], targets: N token ids  ->  [N] float64.

    >>> token_nll_np(np.log([[0.5, 0.25, 0.125, 0.125]]), [1]).round(6).tolist()  # ln 4
    [1.386294]
    """
    return -log_softmax_np(logits)[range(len(targets)), targets]


def token_nll_torch(logits, targets):
    """Same contract as token_nll_np."""
    return -log_softmax_torch(logits)[range(len(targets)), targets]


def kl_divergence_np(logprobs, reference_logprobs):
    """Σ P_ref·(ln P_ref − ln Q) by row, in nats.   two [N, V], finite  ->  [N].

    >>> kl_divergence_np(np.log([[0.25, 0.75]]), np.log([[0.5, 0.5]])).round(6).tolist()
    [0.143841]
    """
    return (np.exp(reference_logprobs) * (reference_logprobs - logprobs)).sum(axis=1)


def kl_divergence_torch(logprobs, reference_logprobs):
    """Same contract as kl_divergence_np."""
    return (torch.exp(reference_logprobs) * (reference_logprobs - logprobs)).sum(dim=1)


def compare_np(logits, reference_logits, targets):
    """What KLDResult sums up, by row: NLL, the reference's NLL, KL divergence, and 1 or 0 for the
    same best token or another (of equal ones the lowest id is the best).

    logits, reference_logits: [N, V], targets: N token ids  ->  [N, 4] float64.
    """
    logprobs = log_softmax_np(logits)
    reference_logprobs = log_softmax_np(reference_logits)
    rows = range(len(targets))
    kld = kl_divergence_np(logprobs, reference_logprobs)
    same_best = logits.argmax(axis=1) == reference_logits.argmax(axis=1)
    return np.stack([-logprobs[rows, targets], -reference_logprobs[rows, targets], kld,
                     same_best.astype(kld.dtype)], axis=1)


def compare_torch(logits, reference_logits, targets):
    """Same contract as compare_np."""
    logprobs = log_softmax_torch(logits)
    reference_logprobs = log_softmax_torch(reference_logits)
    rows = range(len(targets))
    kld = kl_divergence_torch(logprobs, reference_logprobs)
    same_best = logits.argmax(dim=1) == reference_logits.argmax(dim=1)
    return torch.stack([-logprobs[rows, targets], -reference_logprobs[rows, targets], kld,
                        same_best.to(kld.dtype)], dim=1)


def mean_and_se(values):
    """The mean of n ≥ 2 independent numbers, and its standard error, √(variance / n).

    >>> mean_and_se(np.array([1.0, 2.0, 3.0, 6.0]))  # variance 14/3
    (3.0, 1.0801234497346435)
    """
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def perplexity_of(nll):
    """nll: [n] of scored tokens, in nats  ->  PerplexityResult."""
    mean, se = mean_and_se(nll)
    perplexity = math.exp(mean)
    return PerplexityResult(len(nll), mean, se, perplexity, perplexity * se, mean / math.log(2))


def kld_of(nll, reference_nll, kld, same_best):
    """The columns of compare_np, [n] each  ->  KLDResult."""
    own, other = perplexity_of(nll), perplexity_of(reference_nll)
    difference, difference_se = mean_and_se(nll - reference_nll)
    ratio = math.exp(difference)
    return KLDResult(
        len(kld), *mean_and_se(kld), float(np.median(kld)), float(np.percentile(kld, 99)),
        float(kld.max()), *mean_and_se(same_best), own.perplexity, own.perplexity_se,
        other.perplexity, other.perplexity_se, ratio, ratio * difference_se)

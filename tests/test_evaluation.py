"""Perplexity and KL divergence: by hand, by float64 loops, by transformers, and as a command."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from test_cli import assert_refused, run
from test_llm import write_chat_model

from minillm import LLM, InputError, evaluation, evaluation_command
from minillm.cli import main
from minillm.evaluation import (
    compare_np,
    compare_torch,
    evaluate_kld,
    evaluate_perplexity,
    kl_divergence_np,
    kl_divergence_torch,
    kld_of,
    log_softmax_np,
    log_softmax_torch,
    perplexity_of,
    token_nll_np,
    token_nll_torch,
)
from minillm.loading.registry import fetch

ROOT = Path(__file__).parents[1]
TEXT = "To-morrow, and to-morrow, and to-morrow, creeps in this petty pace"
IDS = list(TEXT.encode())  # any token ids; the text's own are others, below
CONTEXT = 80


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random model whose tokens are bytes."""
    return write_chat_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same shape, other numbers."""
    return write_chat_model(tmp_path_factory.mktemp("other"), seed=5,
                            max_position_embeddings=CONTEXT)


@pytest.fixture(params=["numpy", "torch"])
def llm(request, tiny):
    return LLM(tiny, backend=request.param, device="cpu", dtype="float32")


@pytest.fixture
def small_pieces(monkeypatch):
    """With chunks of 7: edges of every kind in a short text."""
    monkeypatch.setattr(evaluation, "SCORED_ROWS", 3)


def loop(llm, reference, token_ids, window):
    """Per token (nll, reference nll, kld, same best), a window at a time, in plain float64."""
    rows = []
    for start in range(0, len(token_ids), window):
        part = token_ids[start : start + window]
        logits, others = llm.logits(part), reference.logits(part)
        for t in range(len(part) - 1):
            p, q = probabilities(others[t]), probabilities(logits[t])
            kld = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
            rows.append((-math.log(q[part[t + 1]]), -math.log(p[part[t + 1]]), kld,
                         q.index(max(q)) == p.index(max(p))))
    return rows


def probabilities(logits):
    best = max(float(each) for each in logits)
    weights = [math.exp(float(each) - best) for each in logits]
    return [each / math.fsum(weights) for each in weights]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def standard_error(values):
    values, n = list(values), len(values)
    return math.sqrt(math.fsum((each - mean(values)) ** 2 for each in values) / (n - 1) / n)


# ---- the arithmetic --------------------------------------------------------------------------


HAND_LOGITS = np.log([[1, 1, 2, 4], [1, 1, 1, 1], [8, 4, 2, 2]])  # divided by 8, 4 and 16
HAND_REFERENCE = np.log([[1, 1, 4, 2], [1, 1, 1, 1], [8, 4, 2, 2]])
HAND_TARGETS = [3, 0, 2]
LN2 = math.log(2)


def test_three_tokens_by_hand():
    """Row 0: p(3) is 1/2, the reference's 1/4;  KL = 1/2·ln 2 + 1/4·ln(1/2) = ln 2 / 4."""
    expected = [[LN2, 2 * LN2, LN2 / 4, 0], [2 * LN2, 2 * LN2, 0, 1], [3 * LN2, 3 * LN2, 0, 1]]
    compared = compare_np(HAND_LOGITS + 5, HAND_REFERENCE - 7, HAND_TARGETS)
    np.testing.assert_allclose(compared, expected, atol=1e-14)
    result = kld_of(*compared.T)
    assert result.num_scored_tokens == 3
    assert result.mean_kld == pytest.approx(LN2 / 12)
    assert result.mean_kld_se == pytest.approx(LN2 / 12)  # √((2/3)·(ln2/4)²/2/3) = ln 2 / 12
    assert (result.median_kld, result.max_kld) == (pytest.approx(0), pytest.approx(LN2 / 4))
    assert result.p99_kld == pytest.approx(0.98 * LN2 / 4)
    assert result.same_best == pytest.approx(2 / 3)
    assert result.same_best_se == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))  # √(p(1 − p)/(n − 1))
    assert result.perplexity == pytest.approx(4)  # nll: ln 2, 2·ln 2, 3·ln 2
    assert result.perplexity_se == pytest.approx(4 * LN2 / math.sqrt(3))
    assert result.reference_perplexity == pytest.approx(2 ** (7 / 3))
    assert result.perplexity_ratio == pytest.approx(2 ** (-1 / 3))
    assert result.perplexity_ratio_se == pytest.approx(2 ** (-1 / 3) * LN2 / 3)


def test_perplexity_by_hand():
    result = perplexity_of(np.array([LN2, 2 * LN2, 3 * LN2]))
    assert result.num_scored_tokens == 3
    assert result.mean_nll == pytest.approx(2 * LN2) and result.bits_per_token == pytest.approx(2)
    assert result.mean_nll_se == pytest.approx(LN2 / math.sqrt(3))
    assert result.perplexity == pytest.approx(4)
    assert result.perplexity_se == pytest.approx(4 * LN2 / math.sqrt(3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_twins_agree(seed, dtype):
    rng = np.random.default_rng(seed)
    N, V = rng.integers(1, 9), rng.integers(10, 300)
    logits, others = (rng.normal(0, 6, (N, V)).astype(dtype) for _ in range(2))
    targets = rng.integers(0, V, N).tolist()
    tensors = torch.from_numpy(logits), torch.from_numpy(others)
    logprobs = log_softmax_np(logits), log_softmax_np(others)
    pairs = [
        (logprobs[0], log_softmax_torch(tensors[0])),
        (token_nll_np(logits, targets), token_nll_torch(tensors[0], targets)),
        (kl_divergence_np(*logprobs), kl_divergence_torch(*map(torch.from_numpy, logprobs))),
        (compare_np(logits, others, targets), compare_torch(*tensors, targets)),
    ]
    for expected, tensor in pairs:
        assert expected.dtype == np.float64 and tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-10, atol=1e-12)
    oracle = torch.nn.functional.kl_div(torch.from_numpy(logprobs[0]),
                                        torch.from_numpy(logprobs[1]),
                                        reduction="none", log_target=True).sum(dim=1)
    np.testing.assert_allclose(pairs[2][0], oracle.numpy(), rtol=1e-10)


def test_log_softmax_survives_large_logits_and_float16():
    logits = np.array([[60000.0, -60000.0, 59999.0]], dtype=np.float16)
    for logprobs in (log_softmax_np(logits), log_softmax_torch(torch.from_numpy(logits)).numpy()):
        assert np.isfinite(logprobs).all()
        assert np.exp(logprobs).sum() == pytest.approx(1)


# ---- whole texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 8, 9, 20, len(IDS) - 1, len(IDS), CONTEXT])
def test_windows_and_chunks_of_any_size_equal_a_float64_loop(llm, other, small_pieces, window):
    reference = LLM(other, device="cpu", dtype="float32")
    nll, reference_nll, kld, same_best = zip(*loop(llm, reference, IDS, window))
    result = evaluate_kld(llm, reference, IDS, window, chunk_size=7)
    num_windows = math.ceil(len(IDS) / window)
    assert result.num_scored_tokens == len(nll) == len(IDS) - num_windows
    close = {"rel": 2e-5}
    assert result.mean_kld == pytest.approx(mean(kld), **close)
    assert result.mean_kld_se == pytest.approx(standard_error(kld), **close)
    assert result.median_kld == pytest.approx(sorted(kld)[len(kld) // 2], rel=0.5)
    assert result.max_kld == pytest.approx(max(kld), **close)
    assert result.same_best == pytest.approx(mean(same_best))
    assert result.reference_perplexity == pytest.approx(math.exp(mean(reference_nll)), **close)
    perplexity = evaluate_perplexity(llm, IDS, window, chunk_size=1)
    assert perplexity.num_scored_tokens == result.num_scored_tokens
    assert perplexity.mean_nll == pytest.approx(mean(nll), **close)
    assert perplexity.mean_nll_se == pytest.approx(standard_error(nll), **close)
    assert perplexity.perplexity == pytest.approx(result.perplexity, **close)
    assert perplexity.perplexity_se == pytest.approx(result.perplexity_se, **close)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_perplexity_equals_that_of_transformers(tmp_path, backend):
    write_chat_model(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    window = 30
    losses = [(len(part) - 1, model(ids, labels=ids).loss.item())
              for part in (IDS[start : start + window] for start in range(0, len(IDS), window))
              for ids in [torch.tensor([part])]]
    expected = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
    llm = LLM(tmp_path, backend=backend, device="cpu", dtype="float32")
    assert evaluate_perplexity(llm, IDS, window).mean_nll == pytest.approx(expected, rel=1e-5)


def test_a_model_beside_itself(llm):
    result = evaluate_kld(llm, llm, IDS, 16)
    assert (result.mean_kld, result.max_kld, result.same_best, result.same_best_se) == (0, 0, 1, 0)
    assert (result.perplexity_ratio, result.perplexity_ratio_se) == (1, 0)


def test_numpy_beside_torch(tiny):
    """Which library adds the numbers up is no difference."""
    models = [LLM(tiny, backend=backend, device="cpu", dtype="float32")
              for backend in ("numpy", "torch")]
    for llm, reference in (models, models[::-1]):
        result = evaluate_kld(llm, reference, IDS, 40)
        assert abs(result.mean_kld) < 1e-8 and result.same_best == 1


def test_an_int8_cache_is_really_read(tiny, small_pieces):
    """Also by the tokens of the chunk that wrote it; the reference keeps its float32 cache."""
    reference = LLM(tiny, device="cpu", dtype="float32")
    for backend in ("numpy", "torch"):
        llm = LLM(tiny, backend=backend, device="cpu", dtype="float32", kv_dtype="int8")
        result = evaluate_kld(llm, reference, IDS, len(IDS), chunk_size=7)
        assert 1e-7 < result.mean_kld < 1e-2
        nll = [row[0] for row in loop(llm, reference, IDS, len(IDS))]
        assert math.log(result.perplexity) == pytest.approx(mean(nll), rel=1e-4)


def test_columns_beyond_the_tokenizer_do_not_count(tmp_path):
    """A vocabulary padded from 257 to 300: the tokens that no text has get no probability."""
    write_chat_model(tmp_path)
    tokenizer = (tmp_path / "tokenizer.json").read_bytes()
    write_checkpoint(tmp_path, "LlamaForCausalLM", vocab_size=300, eos_token_id=256)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    for backend in ("numpy", "torch"):
        llm = LLM(tmp_path, backend=backend, device="cpu", dtype="float32")
        assert llm.logits(IDS).shape[1] == 300 and llm.vocab_size == 257
        logits = llm.logits(IDS)[:-1, :257]
        expected = token_nll_np(logits, IDS[1:]).mean()
        assert evaluate_perplexity(llm, IDS, 80).mean_nll == pytest.approx(expected, rel=1e-6)


def test_every_window_begins_with_the_token_that_begins_texts(tiny):
    llm = LLM(tiny, backend="numpy")
    llm.tokenizer.bos_token_id, llm.tokenizer.add_bos_token = 256, True
    windows = evaluation.split_windows(llm, IDS, 20)
    assert [each[0] for each in windows] == [256] * 4
    assert [token for each in windows for token in each[1:]] == [
        token for i, token in enumerate(IDS) if i % 20]


def test_no_more_than_a_chunk_of_logits_is_there_at_a_time(tiny, small_pieces):
    llm = LLM(tiny, device="cpu", dtype="float32")
    sizes, forward = [], llm.runner.forward
    llm.runner.forward = lambda tokens, *others: sizes.append(len(tokens)) or forward(tokens,
                                                                                      *others)
    evaluate_perplexity(llm, IDS, 20, chunk_size=7)
    assert max(sizes) == 7 and sum(sizes) == len(IDS) - 4


@pytest.mark.parametrize("token_ids, window, reason", [
    (IDS, 1, "window is 1, must be from 2 to the 80 tokens"),
    (IDS, 81, "window is 81, must be from 2 to the 80 tokens"),
    (IDS[:1], 8, "too short: of its 1 tokens, windows of 8 leave 0"),
    (IDS[:2], 8, "too short"),
    (IDS[:3], 2, "too short"),
    ([], 8, "too short"),
    ([65, 257, 66], 8, "token id 257"),
])
def test_what_cannot_be_evaluated_is_refused(tiny, token_ids, window, reason):
    llm = LLM(tiny, backend="numpy")
    for evaluate in (evaluate_perplexity, lambda llm, *rest: evaluate_kld(llm, llm, *rest)):
        with pytest.raises(InputError, match=reason):
            evaluate(llm, token_ids, window)


def test_models_with_other_vocabularies_are_refused(tiny, llm_numpy):
    with pytest.raises(InputError, match="has 257 tokens and the reference .* has 49152"):
        evaluate_kld(LLM(tiny, backend="numpy"), llm_numpy, IDS, 8)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_result(llm, number):
    llm.runner.weights.norm[0] = number
    with pytest.raises(FloatingPointError, match="not finite: .* overflowed in float32"):
        evaluate_perplexity(llm, IDS, 8)


def test_the_real_model_knows_more_than_chance(llm_numpy, llm_torch):
    """48 tokens of Macbeth, against transformers' definition on our logits, in both backends."""
    ids = llm_torch.tokenizer.encode(fetch("macbeth").read_text()[:600])[:48]
    logits, targets = torch.from_numpy(llm_torch.logits(ids)), torch.tensor(ids)
    expected = float(torch.nn.functional.cross_entropy(logits[:-1].double(), targets[1:]))
    for llm in (llm_numpy, llm_torch):
        result = evaluate_perplexity(llm, ids, 48)
        assert result.mean_nll == pytest.approx(expected, rel=1e-4)
    assert result.perplexity < 100
    result = evaluate_kld(llm_numpy, llm_torch, ids, 48)
    assert abs(result.mean_kld) < 1e-6 and result.same_best == 1


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu(tiny, other):
    results = [evaluate_kld(LLM(tiny, device=device, dtype="float32"),
                            LLM(other, device=device, dtype="float32"), IDS, 30)
               for device in ("cpu", "cuda")]
    results.append(evaluate_kld(LLM(tiny, device="cuda", dtype="float32"),
                                LLM(other, device="cpu", dtype="float32"), IDS, 30))
    for result in results[1:]:
        assert result.mean_kld == pytest.approx(results[0].mean_kld, rel=1e-3)
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-3)


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def arguments(tiny, text_file):
    return ["--model", str(tiny), "--text", str(text_file), "--tokens", "60", "--window", "40",
            "--dtype", "float32", "--device", "cpu"]


def test_json_is_one_object_with_every_field(tiny, text_file):
    done = run("eval", "kld", "--model", str(tiny), "--text", str(text_file), "--tokens", "60",
               "--window", "40", "--chunk", "9", "--quantize", "int8", "--kv-dtype", "int8",
               "--device", "cpu", "--dtype", "float32", "--json")
    assert done.returncode == 0
    assert b"58/58" in done.stderr and b"Traceback" not in done.stderr
    printed = json.loads(done.stdout)  # exactly one object, or this raises
    llm = LLM(tiny, device="cpu", dtype="float32", quantize="int8", kv_dtype="int8")
    reference = LLM(tiny, device="cpu", dtype="float32")
    expected = vars(evaluate_kld(llm, reference, llm.tokenizer.encode(TEXT)[:60], 40,
                                 chunk_size=9))
    assert {name: printed.pop(name) for name in expected} == pytest.approx(expected, rel=1e-6)
    assert printed == {
        "metric": "kld", "model": str(tiny), "reference": str(tiny), "backend": "torch",
        "device": "cpu", "dtype": "float32", "quantize": "int8", "kv_dtype": "int8",
        "text": str(text_file), "tokens": 60, "window": 40, "chunk": 9}


def test_perplexity_in_words(capsys, arguments, tiny):
    assert main(["eval", "perplexity", *arguments, "--backend", "numpy"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "numpy cpu float32" in first and "58 tokens of" in first and "windows of 40" in first
    llm = LLM(tiny, backend="numpy")
    result = evaluate_perplexity(llm, llm.tokenizer.encode(TEXT)[:60], 40)
    assert second == (f"perplexity {result.perplexity:.3f} ± {result.perplexity_se:.3f} · "
                      f"{result.bits_per_token:.3f} bits a token")


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_kld_in_words(capsys, arguments, backend):
    assert main(["eval", "kld", *arguments, "--backend", backend]) == 0
    _, second, third = capsys.readouterr().out.splitlines()
    assert second.startswith("KL divergence ") and "same best token 100.00% ± 0.00%" in second
    assert third.endswith("ratio 1.0000 ± 0.0000")


def test_another_model_can_be_the_reference(capsys, arguments, tiny, other):
    assert main(["eval", "kld", *arguments, "--reference", str(other), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["reference"]) == (str(tiny), str(other))
    llm, reference = (LLM(each, device="cpu", dtype="float32") for each in (tiny, other))
    expected = evaluate_kld(llm, reference, llm.tokenizer.encode(TEXT)[:60], 40)
    assert printed["mean_kld"] == pytest.approx(expected.mean_kld) and expected.mean_kld > 0.1


def test_texts_by_name(llm_numpy, monkeypatch, tmp_path):
    for name in ("macbeth", "shakespeare"):
        assert evaluation_command.read_text(name) == fetch(name).read_text(encoding="utf-8")
    prose = evaluation_command.read_text("prose")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert prose.startswith(readme) and len(llm_numpy.tokenizer.encode(prose)) > 8192
    places = [prose.index(path.read_text(encoding="utf-8"))
              for path in sorted(ROOT.glob("chapters/*/README.md"))]
    assert places == sorted(places) and len(places) > 5
    monkeypatch.setattr(evaluation_command, "CHECKOUT", tmp_path)
    with pytest.raises(InputError, match="installed minillm has none"):
        evaluation_command.read_text("prose")


@pytest.mark.parametrize("options, reason", [
    (["perplexity", "--text", "hamlet"], "'hamlet' is neither known nor a file"),
    (["perplexity", "--text", "x" * 5000], "is neither known nor a file"),
    (["perplexity", "--tokens", "67"], "has 66 tokens and --tokens is 67"),
    (["perplexity", "--tokens", "2"], "--tokens is 2, must be at least 3"),
    (["perplexity", "--tokens", "many"], "--tokens"),
    (["perplexity", "--window", "1"], "window is 1, must be from 2 to the 80 tokens"),
    (["perplexity", "--chunk", "0"], "chunk is 0 tokens, must be from 1 to 512"),
    (["kld", "--chunk", "513"], "chunk is 513 tokens, must be from 1 to 512"),
    (["kld", "--window", "81"], "window is 81, must be from 2 to the 80 tokens"),
    (["perplexity", "--tokens", "3", "--window", "2"], "too short"),
    (["perplexity", "--reference", "macbeth"], "--reference is what kld compares with"),
    (["kld", "--reference", "macbeth"], "is a text, not a model"),
    (["kld", "--quantize", "int3"], "'int3'"),
    (["kld", "--kv-dtype", "int3"], "'int3'"),
    (["accuracy"], "'accuracy'"),
    ([], "metric"),
])
def test_a_mistake_costs_one_line(capsys, arguments, options, reason):
    assert_refused(capsys, ["eval", *arguments, *options], reason)


def test_a_file_that_is_no_text_is_refused(capsys, arguments, text_file):
    text_file.write_bytes(b"caf\xe9 au lait")
    assert_refused(capsys, ["eval", "perplexity", *arguments], "no UTF-8 text, byte 3")


def test_a_reference_that_cuts_texts_differently_is_refused(tiny, text_file, capsys, arguments,
                                                            tmp_path):
    write_chat_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["T"], vocab["o"] = vocab["o"], vocab["T"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert_refused(capsys, ["eval", "kld", *arguments, "--reference", tmp_path],
                   "cuts the text into other tokens")


def test_ctrl_c_ends_it_as_it_ends_other_commands(tiny, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 3000)
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm", "eval", "perplexity", "--model", str(tiny), "--backend",
         "numpy", "--text", str(path), "--tokens", str(60 * 3000), "--window", "20"], cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown = b""
    while b"token/s" not in shown:
        shown += process.stderr.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err.endswith(b"\ninterrupted\n") and b"Traceback" not in err

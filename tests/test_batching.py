"""The static batch: every row gets what it would get alone, and padding is seen by nobody."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm import assert_same_choices, write_chat_model

from minillm import LLM, SamplingParams, batching
from minillm.batching import (
    PaddedCache,
    PaddedCacheTorch,
    decode_batch,
    generate_static,
    pad_batch,
    padded_mask_np,
    padded_mask_torch,
)
from minillm.kv_cache import KVCache, KVCacheTorch
from minillm.request import Request

L, H, K, D = 3, 6, 2, 10
CONFIG = SimpleNamespace(num_hidden_layers=L, num_key_value_heads=K, head_dim=D)
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 6e-2}  # of the largest entry
a_few = settings(max_examples=20, deadline=None)
prompts = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


def greedy(max_tokens, **others):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


# ── Padding and its mask ─────────────────────────────────────────────────────────────────────


def test_pad_batch_by_hand():
    tokens, positions, num_padding = pad_batch([[7, 8], [5], [4, 3, 2, 1]], pad_token_id=9)
    assert tokens.tolist() == [[9, 9, 7, 8], [9, 9, 9, 5], [4, 3, 2, 1]]
    assert positions.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert num_padding.tolist() == [2, 3, 0]


@a_few
@given(prompts)
def test_a_row_is_its_padding_and_its_prompt(prompts):
    tokens, positions, num_padding = pad_batch(prompts)
    T = max(map(len, prompts))
    assert tokens.shape == positions.shape == (len(prompts), T)
    assert num_padding.shape == (len(prompts),)
    for array in (tokens, positions, num_padding):
        assert np.issubdtype(array.dtype, np.integer)
    for b, prompt in enumerate(prompts):
        assert tokens[b].tolist() == [0] * num_padding[b] + prompt
        assert positions[b].tolist() == [0] * num_padding[b] + list(range(len(prompt)))


def test_mask_by_hand():
    """Columns: two of padding, then a token, then the two queries; and one without padding."""
    visible = padded_mask_np(np.array([2, 0]), 2, 5)
    assert visible.astype(int).tolist() == [[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
                                            [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


@a_few
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 9))
def test_mask_against_loops(num_padding, T, num_before):
    S = T + num_before
    visible = padded_mask_np(np.array(num_padding), T, S)
    assert visible.shape == (len(num_padding), T, S) and visible.dtype == bool
    for b, t, s in np.ndindex(visible.shape):
        query = num_before + t
        assert visible[b, t, s] == (num_padding[b] <= s <= query or s == query)
    np.testing.assert_array_equal(padded_mask_torch(torch.tensor(num_padding), T, S), visible)


# ── The cache ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("device, dtype", [
    ("numpy", "float64"), ("numpy", "float32"), ("cpu", "float64"), ("cpu", "float32"),
    ("cpu", "bfloat16"), pytest.param("cuda", "bfloat16", marks=pytest.mark.cuda)])
@a_few
@given(prompts, st.integers(0, 5), seeds)
def test_each_row_gets_what_a_cache_of_its_own_gives(device, dtype, prompts, num_steps, seed):
    rng = np.random.default_rng(seed)
    tokens, _, num_padding = pad_batch(prompts)
    (B, T), capacity = tokens.shape, tokens.shape[1] + num_steps

    def new(kind, twin, *arguments):
        if device == "numpy":
            return kind(CONFIG, *arguments, dtype)
        return twin(CONFIG, *arguments, getattr(torch, dtype), torch.device(device))

    def attend(cache, layer, qkv):
        if device == "numpy":
            return cache.attend(layer, *(x.astype(dtype) for x in qkv))
        qkv = [torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in qkv]
        return cache.attend(layer, *qkv).double().cpu().numpy()

    padded = new(PaddedCache, PaddedCacheTorch, num_padding, capacity)
    alone = [new(KVCache, KVCacheTorch, capacity) for _ in prompts]
    for is_prompt in [True] + [False] * num_steps:
        num_new = T if is_prompt else 1
        for layer in range(L):
            qkv = [rng.normal(size=(B * num_new, heads, D)) for heads in (H, K, K)]
            out = attend(padded, layer, qkv)
            assert out.shape == (B * num_new, H, D) and np.isfinite(out).all()
            for b in range(B):
                first = num_padding[b] if is_prompt else 0
                real = slice(b * num_new + first, (b + 1) * num_new)
                expected = attend(alone[b], layer, [x[real] for x in qkv])
                np.testing.assert_allclose(out[real], expected, rtol=0, atol=TOLERANCE[dtype]
                                           * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_a_column_too_many_is_refused(device):
    args = CONFIG, np.array([0, 2]), 3
    cache = (PaddedCache(*args) if device == "numpy" else
             PaddedCacheTorch(*args, torch.float32, torch.device("cpu")))
    q, k = np.ones((8, H, D), np.float32), np.ones((8, K, D), np.float32)
    q, k = (q, k) if device == "numpy" else (torch.from_numpy(q), torch.from_numpy(k))
    with pytest.raises(ValueError, match="4 columns do not fit in a cache of 3"):
        cache.attend(0, q, k, k)
    assert cache.attend(0, q[:6], k[:6], k[:6]).shape == (6, H, D)


# ── The loop ─────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_who_is_asked_and_what_is_fed(lengths):
    """Row b's tokens are 100·b + 1, 100·b + 2, …, as many as lengths[b]."""
    picked, fed, first_positions = [], [], [10 * b + 3 for b in range(len(lengths))]

    def pick(row, logits):
        assert logits == ("logits", len(fed), row), "the row's own, and the newest"
        picked.append(row)
        count = picked.count(row)
        return 100 * row + count, count == lengths[row]

    def forward(tokens, positions):
        fed.append((list(tokens), list(positions)))
        return [("logits", len(fed), row) for row in range(len(lengths))]

    first_logits = [("logits", 0, row) for row in range(len(lengths))]
    assert decode_batch(forward, first_logits, first_positions, pick) == max(lengths) - 1
    assert picked == [row for step in range(max(lengths)) for row, length in enumerate(lengths)
                      if step < length]
    assert fed == [([100 * row + min(step + 1, length) for row, length in enumerate(lengths)],
                    [position + step for position in first_positions])
                   for step in range(max(lengths) - 1)]
    assert first_positions == [10 * b + 3 for b in range(len(lengths))], "the caller's own list"


# ── Answers ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exact(tiny):
    """float64: a row's sums may be taken in any order and choose the same token."""
    return LLM(tiny, backend="numpy", dtype="float64", batching="static", max_num_seqs=40)


TEXTS = ["In", "A long time ago there was", "x", "two\nlines", "1, 2, 3, 5, 8, 13,", "ééé"]
PARAMS = [
    greedy(9), greedy(20, repetition_penalty=1.3), SamplingParams(max_tokens=7, seed=3),
    SamplingParams(max_tokens=11, seed=4, n=3, logprobs=2, top_p=0.9), greedy(1),
    SamplingParams(max_tokens=16, seed=5, min_tokens=3, stop=["e", "o"], temperature=2.0)]


def test_a_batch_gives_what_each_gets_alone(exact):
    together = exact.generate(TEXTS, PARAMS)
    for text, params, output in zip(TEXTS, PARAMS, together):
        alone, = exact.generate([text], params)
        assert [each.token_ids for each in output.outputs] == [
            each.token_ids for each in alone.outputs]
        assert [(each.text, each.finish_reason) for each in output.outputs] == [
            (each.text, each.finish_reason) for each in alone.outputs]
        for completion, twin in zip(output.outputs, alone.outputs):
            if params.logprobs is not None:
                for reported, expected in zip(completion.logprobs, twin.logprobs, strict=True):
                    assert reported == pytest.approx(expected, abs=1e-9)
    assert len({output.text for output in together}) == len(TEXTS)
    assert together[3].outputs[0].text != together[3].outputs[1].text
    for output in together:
        for completion in output.outputs:
            assert completion.metrics.num_output_tokens == len(completion.token_ids)
            assert completion.metrics.num_prompt_tokens == len(output.prompt_token_ids)
            assert len(completion.metrics.itl_ms) == len(completion.token_ids) - 1


def test_the_cost_is_that_of_the_longest_row(exact, monkeypatch):
    """One pass for the prompts, B·T rows wide; then B rows until the last has finished."""
    sizes, forward = [], exact.runner.forward

    def counted(tokens, positions, cache, rows=None):
        sizes.append(len(tokens))
        return forward(tokens, positions, cache, rows)

    monkeypatch.setattr(exact.runner, "forward", counted)
    exact.generate(["abc", "abcde", "a"], [greedy(2), greedy(6), greedy(1)])
    assert sizes == [3 * 5] + [3] * 5


def test_the_context_ends_each_row_for_itself(tmp_path):
    llm = LLM(write_chat_model(tmp_path, max_position_embeddings=24), backend="numpy",
              dtype="float64", batching="static")
    outputs = llm.generate(["x" * 23, "x", "x" * 12], greedy(100, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [1, 23, 12]
    assert {output.finish_reason for output in outputs} == {"length"}


def test_seats_are_rows_and_the_next_batch_waits(exact, monkeypatch):
    """Requests of 3, 1, 2, 5 and 1 rows in 4 seats; one that wants more runs by itself."""
    batches = []

    def counted(runner, tokenizer, requests):
        batches.append([request.params.n for request in requests])
        generate_static(runner, tokenizer, requests)

    monkeypatch.setattr("minillm.llm.generate_static", counted)
    monkeypatch.setattr(exact, "engine_config", SimpleNamespace(max_num_seqs=4))
    params = [SamplingParams(n=n, seed=n, max_tokens=2) for n in (3, 1, 2, 5, 1)]
    outputs = exact.generate(["a", "b", "c", "d", "e"], params)
    assert batches == [[3, 1], [2], [5], [1]]
    assert [len(output.outputs) for output in outputs] == [3, 1, 2, 5, 1]
    assert all(each.finish_reason for output in outputs for each in output.outputs)


def test_an_interrupt_leaves_metrics_of_what_came(exact, monkeypatch):
    calls, forward = [], exact.runner.forward

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # the prompts, and two tokens after the first
            raise KeyboardInterrupt
        return forward(*args)

    requests = [Request(exact.encode_prompt(text), greedy(9), ()) for text in ("ab", "c")]
    monkeypatch.setattr(exact.runner, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_static(exact.runner, exact.tokenizer, requests)
    for request in requests:
        assert len(request.output.token_ids) == 3
        assert request.output.metrics.num_output_tokens == 3


# ── Outside oracle: transformers' own padded batch ───────────────────────────────────────────


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A tiny model of ours, and the same one of transformers."""
    folder = write_chat_model(tmp_path_factory.mktemp("oracle"))
    model = write_checkpoint(folder, "LlamaForCausalLM", vocab_size=257, eos_token_id=256, seed=1)
    return folder, model


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("has_end", [False, True])
def test_a_batch_equals_transformers_left_padded_batch(oracle, backend, has_end):
    folder, model = oracle
    llm = LLM(folder, backend=backend, device="cpu", dtype="float32", batching="static")
    encoded = [llm.encode_prompt(text) for text in TEXTS]
    tokens, _, num_padding = pad_batch(encoded)
    # What ends a text, here: the sixth token of the first answer, so that rows end apart.
    end = llm.generate([encoded[0]], greedy(6))[0].token_ids[-1] if has_end else None
    llm.stop_token_ids = (end,) if has_end else ()
    outputs = llm.generate(encoded, greedy(20))
    mask = torch.arange(tokens.shape[1]) >= torch.from_numpy(num_padding)[:, None]
    model.generation_config.eos_token_id = end
    answers = model.generate(torch.from_numpy(tokens), attention_mask=mask.long(), do_sample=False,
                             max_new_tokens=20, pad_token_id=256)[:, tokens.shape[1]:].tolist()
    assert (len({len(output.token_ids) for output in outputs}) > 1) == has_end
    for output, answer in zip(outputs, answers):
        if end in answer:
            answer = answer[: answer.index(end) + 1]
        assert_same_choices(llm, output.prompt_token_ids, output.token_ids, answer)


def test_the_padding_token_is_read_by_nobody(exact, monkeypatch):
    texts = [output.text for output in exact.generate(TEXTS, greedy(8))]
    monkeypatch.setattr(batching, "pad_batch", lambda prompts: pad_batch(prompts, 77))
    assert [output.text for output in exact.generate(TEXTS, greedy(8))] == texts

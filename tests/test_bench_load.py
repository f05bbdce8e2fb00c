"""What the benches of many requests count and conclude; their clocks are not judged."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from minillm.bench import bookkeeping, llamacpp, load, load_report, long_prompt, timeline
from minillm.bench import open_loop as loop
from minillm.bench import throughput_report as report
from minillm.bench.engines import Minillm, Transformers
from minillm.bench.workload import (
    ANSWER_LENGTHS,
    PROMPT_LENGTHS,
    Lengths,
    arrival_times,
    cut_prompts,
    draw_lengths,
    pack,
    unpack,
)
from minillm.config import ModelConfig
from minillm.loading.checkpoint import Checkpoint
from minillm.model_runner import NumpyRunner

MODEL = "smollm2-135m-instruct"


class TinyCheckpoint(Checkpoint):
    """One layer of random numbers, and a tokenizer of one-letter tokens."""

    eos_token_ids, rope_freq_factors, vocab_size = (0,), None, 26
    config = ModelConfig(vocab_size=26, hidden_size=12, intermediate_size=10, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                         max_position_embeddings=512)

    def tensor(self, name, shape):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32)

    special_tokens = {}

    def token_bytes(self, token):
        return bytes([97 + token])


@pytest.fixture(scope="module")
def tiny():
    """As much of an LLM as the benches ask for."""
    checkpoint = TinyCheckpoint()
    return SimpleNamespace(runner=NumpyRunner(checkpoint), tokenizer=checkpoint,
                           stop_token_ids=(0,), context_len=512)


TEXT = [1 + number % 25 for number in range(997)]

# What is asked.


def test_lengths_are_drawn_from_the_distribution_that_is_documented():
    lengths = Lengths(median=50, sigma=1.0, shortest=1, longest=10**9).draw(
        np.random.default_rng(0), 20000)
    assert np.median(lengths) == pytest.approx(50, rel=0.05)
    assert np.std(np.log(lengths)) == pytest.approx(1, rel=0.05)
    assert np.mean(lengths) == pytest.approx(50 * np.exp(0.5), rel=0.05), "a long tail"


def test_lengths_keep_their_bounds_and_their_seed():
    prompts, answers = draw_lengths(500, PROMPT_LENGTHS, ANSWER_LENGTHS, seed=3)
    assert (prompts, answers) == draw_lengths(500, PROMPT_LENGTHS, ANSWER_LENGTHS, seed=3)
    assert prompts != draw_lengths(500, PROMPT_LENGTHS, ANSWER_LENGTHS, seed=4)[0]
    for lengths, drawn in ((PROMPT_LENGTHS, prompts), (ANSWER_LENGTHS, answers)):
        assert lengths.shortest <= min(drawn) and max(drawn) <= lengths.longest
        assert all(isinstance(length, int) for length in drawn)


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_between_arrivals(burstiness):
    """A gamma distribution of shape b has a standard deviation of mean/√b."""
    times_s = arrival_times(20000, rate=5.0, burstiness=burstiness)
    gaps_s = np.diff(times_s)
    assert times_s[0] == 0 and (gaps_s >= 0).all()
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps_s.std() == pytest.approx(0.2 / burstiness**0.5, rel=0.1)


def test_another_rate_is_the_same_pattern():
    assert np.allclose(np.multiply(arrival_times(9, 2.0), 2), arrival_times(9, 1.0))


@given(st.lists(st.one_of(st.integers(0, 10**12), st.floats(0, 1e6))))
def test_packed_numbers_come_back(numbers):
    assert np.allclose(unpack(pack(numbers)), numbers, rtol=0, atol=6e-6)


def test_prompts_differ_and_begin_again_at_the_end_of_the_text():
    prompts = cut_prompts(list(range(10)), [4, 5, 3])
    assert prompts == [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 0, 1]]


# Who answers.


def test_transformers_answers_a_padded_batch_as_each_prompt_alone(tmp_path):
    class TinyTransformers(Transformers):
        def load(self, model, dtype):
            return write_checkpoint(model, "LlamaForCausalLM", dtype=dtype)

    engine = TinyTransformers(tmp_path, "float32", max_num_seqs=2)
    prompts, nums_tokens = [[50, 35, 28, 46, 31], [1, 28], [26, 22, 32]], [3, 2, 4]
    answers, seconds, num_rows = engine.answer_many(prompts, nums_tokens)
    assert answers == [engine.answer(prompt, num)[0] for prompt, num in zip(prompts, nums_tokens)]
    assert num_rows == (2 * 5 + 2 * 2) + (3 + 3) and seconds > 0


def test_parallel_sequences_of_llama_cpp_are_what_each_is_alone(model_path):
    pytest.importorskip("llama_cpp")
    prompts = [[504, 3575, 282, 4649, 314], [260, 2260, 325, 28, 284], [504, 9, 10, 11, 12]]
    alone = llamacpp.LlamaCpp(str(model_path))
    together = llamacpp.LlamaCppParallel(str(model_path))
    for _ in range(2):  # the first time tries both kinds of memory
        answers, _, num_rows = together.answer_many(prompts, [4] * 3)
        assert answers == [alone.answer(prompt, 4)[0] for prompt in prompts]
        assert num_rows == 3 * (5 + 3)
    with pytest.raises(ValueError, match="room"):
        together.answer_many([[1] * 200], [100])


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_rows_are_counted_and_accounted_for(batching):
    """Every row that went through the model is one of the kinds that the table names."""
    engine = Minillm(MODEL, "numpy", batching=batching, max_num_seqs=2)
    prompt_tokens, answer_tokens = [3, 7, 2, 4, 5], [4, 1, 2, 3, 2]
    answers, _, num_rows = engine.answer_many(cut_prompts(TEXT, prompt_tokens), answer_tokens)
    part = {"arguments": {"seats": 2}, "prompt_tokens": prompt_tokens,
            "answer_tokens": answer_tokens, "contestants": {"x": {"is_static":
                                                                 batching == "static"}},
            "samples": [{"contestant": "x", "rows": num_rows}]}
    is_static = batching == "static"
    assert list(map(len, answers)) == answer_tokens
    assert report.count_rows(part, "x") == {
        "prompts": 21, "answers": 7, "padding": 6 * is_static, "finished": 4 * is_static,
        "again": 0}


# Serving in an open loop.


def test_the_door_opens_when_a_request_is_due(tiny):
    requests = loop.make_requests(tiny, [[1], [2], [3], [4]], [1] * 4)
    door = loop.Doorway(requests, [0.0, 0.0, 0.0, 1000.0])
    assert [each.submitted_s - door.start_s for each in requests] == pytest.approx(
        [0, 0, 0, 1000])
    assert door.take(2) == requests[:2] and door.num_outside() == 1
    assert door.take() == requests[2:3] and door.take() == [] and door.num_outside() == 0


@pytest.mark.parametrize("num_blocks", [100, 12])
def test_steps_of_a_served_load_add_up(tiny, num_blocks):
    prompt_tokens, answer_tokens = [30, 5, 17, 40, 8, 3], [9, 20, 1, 6, 30, 12]
    requests = loop.make_requests(tiny, cut_prompts(TEXT, prompt_tokens), answer_tokens)
    engine = loop.new_engine(tiny, max_num_seqs=3, max_num_batched_tokens=16, block_size=4,
                             num_blocks=num_blocks)
    steps = np.array(loop.serve_engine(engine, requests, [0.0, 0.0, 0.0, 0.001, 0.002, 0.003]))
    rows = dict(zip(loop.STEP_COLUMNS, steps.T))
    assert [len(request.output.token_ids) for request in requests] == answer_tokens
    assert (np.diff(rows["end_s"]) > 0).all()
    assert rows["running"].max() == (3 if num_blocks == 100 else 2) and rows["waiting"].max() >= 1
    assert (rows["prefill_tokens"] + rows["decode_tokens"]).max() == 16
    assert rows["blocks"][-1] == 0 and rows["waiting"][-1] == 0
    total = rows["prefill_tokens"].sum() + rows["decode_tokens"].sum()
    useful = sum(prompt_tokens) + sum(answer_tokens) - 6
    if num_blocks == 100:
        assert rows["preempted"].sum() == 0 and total == useful
        assert rows["prefill_tokens"].sum() == sum(prompt_tokens)
    else:
        assert rows["preempted"].sum() >= 1 and total > useful


def test_static_batches_take_who_waits_and_no_more_than_there_are_seats(tiny):
    requests = loop.make_requests(tiny, cut_prompts(TEXT, [4] * 5), [3, 1, 2, 2, 4])
    batches = loop.serve_static(tiny, requests, [0.0] * 5, seats=2)
    assert [size for _, size, _ in batches] == [2, 2, 1]
    assert [waiting for *_, waiting in batches] == [3, 1, 0]
    times_s = [unpack(line) for line in loop.record(requests)]
    assert list(map(len, times_s)) == [3, 1, 2, 2, 4]
    assert min(times_s[2][0], times_s[3][0]) > times_s[0][-1], "the second batch waits"


def test_the_timeline_shows_what_it_is_there_to_show(tiny, monkeypatch):
    monkeypatch.setenv("MINILLM_FAST", "0")
    part = timeline.measure_timeline(tiny, TEXT)
    pieces, arguments = timeline.pieces_of(part), part["arguments"]
    num_pieces = {number: 0 for number in range(arguments["requests"])}
    tokens = dict.fromkeys(num_pieces, 0)
    for request, _, num, kind in pieces:
        num_pieces[request] += kind == "prompt"
        tokens[request] += num if kind == "prompt" else 0
    (step, victim), = part["preempted"]
    assert tokens == dict(enumerate(arguments["prompt_tokens"])), "every prompt, whole"
    assert max(num_pieces.values()) >= 3, "a prompt is cut"
    assert all(each > step for request, each, _, kind in pieces
               if request == victim and kind == "again")
    assert any(kind == "again" for *_, kind in pieces)
    answers = [sum(request == number and kind == "answer" for request, *_, kind in pieces)
               for number in range(arguments["requests"])]
    for number, num in enumerate(answers):  # a prefill samples one, and so does the second one
        assert num == arguments["answer_tokens"][number] - 1 - (number == victim)
    assert unpack(part["steps"]["waiting"]).max() >= 2
    assert unpack(part["steps"]["running"]).max() == arguments["seats"]


def test_a_long_prompt_comes_in_pieces_between_which_others_go_on(tiny):
    prompts = cut_prompts(TEXT, [6, 6])
    long = cut_prompts(TEXT, [90])[0]
    part = {"samples": [{"budget": budget, "round": 0,
                         **long_prompt.interrupt(tiny, prompts, long, budget)}
                        for budget in (128, 12)]}
    for sample, num_gaps in zip(part["samples"], (1, 9)):  # 10 tokens a step beside 2 that run
        ends_s, _ = long_prompt.gaps_of(sample)
        first_token_s = sample["first_token_s"] - sample["arrival_s"]
        assert sum((ends_s > 0) & (ends_s < first_token_s + 1e-5)) == num_gaps
        assert sum(ends_s <= 0) >= long_prompt.STEPS_BEFORE


# What is concluded.


def test_experience_worked_by_hand():
    part = {"samples": [{"budget": 64, "round": 0, "arrival_s": 1.0, "first_token_s": 2.5,
                         "token_times_s": "0.7 0.8 0.9 1.5 2.5 2.6"}]}
    (p99_ms,), (before_ms,), (ttft_ms,) = long_prompt.experience(part, 64)
    assert p99_ms == pytest.approx(600 + 0.99 * 400)  # of 600 and 1000
    assert before_ms == pytest.approx(100)
    assert ttft_ms == pytest.approx(1500)


def test_capacity_is_the_speed_while_somebody_waits():
    """100 rows a second until the last one got its seat; what then dies away counts nothing."""
    steps = [(1.0, 2, 1, 5, 0, 100, 0), (2.0, 2, 1, 5, 0, 60, 40), (9.0, 1, 0, 5, 0, 0, 1)]
    assert load.measure_capacity(steps, [10, 20], [6, 6]) == pytest.approx(100 / 20)


def test_summary_of_a_run_worked_by_hand():
    part = {"prompt_tokens": [5, 6, 7],
            "arguments": {"max_ttft_ms": 300, "max_tpot_ms": 120}}
    run = {"arrivals_s": "0 1 3.5", "token_times_s": ["0.1 0.2 0.3", "0.4 0.5", "0.2 0.5"],
           "steps": {"waiting": "0 2 1", "preempted": "0 1 0"}}
    summary = load_report.summarize(part, run)
    assert summary["ttft_ms"][50] == pytest.approx(200)
    assert summary["itl_ms"][50] == pytest.approx(100)
    assert summary["requests_per_s"] == pytest.approx(3 / 4)
    assert summary["output_tokens_per_s"] == pytest.approx(7 / 4)
    assert summary["goodput"] == pytest.approx(1 / 4), "one was late, and one was slow"
    assert (summary["preemptions"], summary["most_waiting"]) == (1, 2)


def test_goals_are_ratios_within_a_round():
    """The second round is ten times slower for all; the fastest peer is another in each."""
    def sample(name, question, number, seconds):
        return {"contestant": name, "question": question, "round": number, "seconds": seconds,
                "rows": 1}

    at_once = [sample(name, size, number, seconds) for size in (1, 8)
               for name, rounds in (("minillm a", (1.0, 10.0)), ("minillm b", (4.0, 40.0)),
                                    ("x", (2.0, 50.0)), ("y", (3.0, 20.0)))
               for number, seconds in enumerate(rounds)]
    mixed = [sample(name, "mixed", number, seconds)
             for name, rounds in (("minillm static w8a8", (6.0, 40.0)),
                                  ("minillm continuous w8a8", (2.0, 20.0)))
             for number, seconds in enumerate(rounds)]
    result = {
        "at_once": {"arguments": {"sizes": (1, 8), "answer_tokens": 5}, "samples": at_once,
                    "contestants": dict.fromkeys(("minillm a", "minillm b", "x", "y"))},
        "mixed": {"answer_tokens": [3, 4], "samples": mixed,
                  "contestants": {each["contestant"]: {} for each in mixed}},
        "bookkeeping": {"steps": [{"running": 4, "step_s": 10.0, "forward": 8.0, "best_tokens": 1.0,
                                   "schedule": 0.25}]},
    }
    (at_8, ratios_8, aim_8), (_, ratios_mixed, _), (_, shares, _) = report.goals(result)
    assert "minillm a" in at_8 and aim_8 == "≥ 0.8"
    assert ratios_8 == pytest.approx([2, 2])
    assert ratios_mixed == pytest.approx([3, 2])
    assert shares == pytest.approx([0.1])
    assert bookkeeping.shares(result["bookkeeping"], 4)["rest"] == pytest.approx(0.075)


def test_a_stopwatch_sums_up_and_starts_again():
    watched, watch = SimpleNamespace(work=lambda number: number + 1), bookkeeping.Stopwatch()
    watch.watch(watched, "work")
    assert watched.work(1) == 2
    assert watch.take()["work"] > 0 and watch.take() == {"work": 0.0}


def test_who_was_asked_once_counts_in_every_round():
    samples = [{"contestant": name, "question": 8, "round": number, "seconds": seconds, "rows": 1}
               for name, number, seconds in (("minillm a", 0, 1.0), ("minillm a", 1, 1.0),
                                             ("x", 0, 4.0), ("x", 1, 5.0), ("slow", 0, 2.0))]
    result = {"at_once": {"arguments": {"answer_tokens": 5}, "samples": samples,
                          "contestants": dict.fromkeys(("minillm a", "x", "slow"))}}
    assert report.best_peers(result, 8) == {0: 20, 1: 20}

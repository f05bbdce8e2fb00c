"""Many requests behind the front door: the same texts in every kind of batching, streams side by
side, and an engine that is empty when everybody has left. A tiny model, in float64."""

from __future__ import annotations

import gc
import re
from itertools import zip_longest

import pytest
from test_llm import assert_same_choices, finish, greedy, write_chat_model

from minillm import LLM, InputError, SamplingParams, scheduler
from minillm.sequence import Answer

TEMPLATE = ("{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
            "{% endfor %}assistant:")
TEXTS = ["In", "A long time ago there was", "x", "two\nlines", "1, 2, 3, 5, 8, 13,", "ééé", "In"]
PARAMS = [
    greedy(9), greedy(20, repetition_penalty=1.3), SamplingParams(max_tokens=7, seed=3),
    SamplingParams(max_tokens=11, seed=4, n=3, logprobs=2, top_p=0.9), greedy(1, logprobs=0),
    SamplingParams(max_tokens=30, seed=5, min_tokens=3, stop=["Q", "4J"], temperature=2.0),
    SamplingParams(max_tokens=9, seed=6, logit_bias={70: 5.0}, presence_penalty=1.5)]
# Few seats, small pieces, and blocks for about three answers: everything waits and is preempted.
NARROW = {"max_num_seqs": 5, "max_num_batched_tokens": 7, "block_size": 4, "num_blocks": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("tiny"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def open_llm(folder):
    def open_llm(batching="continuous", **options):
        return LLM(folder, **{"backend": "numpy", "dtype": "float64", "batching": batching,
                              **options})

    return open_llm


@pytest.fixture(scope="module")
def alone(open_llm):
    """One request after the other: chapter 07's loop, which knows no engine."""
    return open_llm("none")


@pytest.fixture
def llm(open_llm):
    return open_llm(**NARROW)


def answers(output):
    return [(each.token_ids, each.text, each.finish_reason) for each in output.outputs]


def assert_empty(llm):
    """Nobody is in the engine, and every block can be had."""
    engine = llm.engine
    assert (engine.answers, engine.scheduler.waiting, engine.scheduler.running) == ({}, [], [])
    assert engine.scheduler.blocks.num_available_blocks == engine.scheduler.blocks.num_blocks
    engine.scheduler.blocks.check_integrity([])


def interrupt_at(monkeypatch, llm, call, error=KeyboardInterrupt):
    """Let that call of the model fail, counted from now; -> the list of calls."""
    calls, forward = [], llm.runner.forward

    def interrupted(*args):
        calls.append(len(args[0]))
        if len(calls) == call:
            raise error
        return forward(*args)

    monkeypatch.setattr(llm.runner, "forward", interrupted)
    return calls


# ── The same texts ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def expected(alone):
    outputs = [alone.generate(text, params)[0] for text, params in zip(TEXTS, PARAMS)]
    assert len({output.text for output in outputs}) == len(outputs)
    assert {each.finish_reason for output in outputs for each in output.outputs} == {
        "stop", "length"}
    return outputs


@pytest.mark.parametrize("batching, options", [
    ("none", {}), ("static", {}), ("static", {"max_num_seqs": 2}), ("continuous", {}),
    ("continuous", NARROW), ("continuous", {**NARROW, "enable_prefix_caching": False}),
    ("continuous", {"max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 1,
                    "num_blocks": 50})])
def test_every_kind_of_batching_gives_the_same_texts(open_llm, expected, batching, options):
    llm = open_llm(batching, **options)
    outputs = llm.generate(TEXTS, PARAMS)
    for output, params, other in zip(outputs, PARAMS, expected, strict=True):
        assert answers(output) == answers(other)
        assert output.prompt_token_ids == other.prompt_token_ids
        for completion, twin in zip(output.outputs, other.outputs, strict=True):
            assert completion.metrics.num_output_tokens == len(completion.token_ids)
            assert completion.metrics.ttft_ms > 0
            assert (completion.logprobs is None) == (params.logprobs is None)
            for found, wanted in zip(completion.logprobs or [], twin.logprobs or [], strict=True):
                assert list(found) == list(wanted)
                assert found == pytest.approx(wanted, abs=1e-9)
    if batching == "continuous":
        assert_empty(llm)
    else:
        assert "engine" not in vars(llm), "no engine, and no cache of one"


def test_the_narrow_engine_does_preempt(llm, monkeypatch):
    """Or the test above would not have seen it."""
    preempted, preempt = [], scheduler.preempt

    def counted(sequence, *args):
        preempted.append(sequence.order)
        preempt(sequence, *args)

    monkeypatch.setattr(scheduler, "preempt", counted)
    llm.generate(TEXTS, PARAMS)
    assert preempted


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}])
def test_in_torch_as_well(folder, options):
    common = {"backend": "torch", "device": "cpu", "dtype": "float32", **options}
    one_by_one = LLM(folder, batching="none", **common)
    others = [LLM(folder, **common), LLM(folder, **common, **NARROW)]
    if not options:
        others.append(LLM(folder, batching="static", **common))
    expected = [one_by_one.generate(text, greedy(12))[0] for text in TEXTS]
    for llm in others:
        for output, other in zip(llm.generate(TEXTS, greedy(12)), expected, strict=True):
            assert_same_choices(llm, other.prompt_token_ids, output.token_ids, other.token_ids)


def test_a_seed_decides_whatever_runs_beside_it(llm, alone):
    params = SamplingParams(seed=9, max_tokens=12, temperature=1.5)
    wanted = alone.generate("The sea", params)[0].text
    assert llm.generate("The sea", params)[0].text == wanted
    crowd = llm.generate(["a", "The sea", "b", "The sea", *TEXTS],
                         [SamplingParams(max_tokens=5), params] * 2 + PARAMS)
    assert crowd[1].text == crowd[3].text == wanted


def test_a_prompt_of_several_answers_is_computed_once(open_llm, monkeypatch):
    llm = open_llm()
    calls = interrupt_at(monkeypatch, llm, call=0)  # never: it only counts
    output, = llm.generate("x" * 50, SamplingParams(n=4, seed=1, max_tokens=6))
    assert calls == [50] + [4] * 5
    assert len({completion.text for completion in output.outputs}) == 4
    assert [each.metrics.num_cached_tokens for each in output.outputs] == [0] * 4


def test_chat_is_generate_with_a_template(llm, alone):
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, greedy(8))
    assert answers(output) == answers(alone.chat(messages, greedy(8)))
    assert answers(output) == answers(llm.generate("user: Hi\nassistant:", greedy(8))[0])


def test_no_prompts_are_no_answers(llm):
    assert llm.generate([]) == []
    assert "engine" not in vars(llm)


@pytest.mark.parametrize("batching", ["continuous", "static", "none"])
def test_progress_counts_requests(open_llm, capsys, batching):
    llm = open_llm(batching, **({} if batching == "none" else {"max_num_seqs": 2}))
    llm.generate(["a", "b", "c"], [greedy(1), greedy(4), greedy(2)], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"answer: 100%.* 3/3 .*prompt", err)
    llm.generate(["a", "b"], greedy(1))
    assert capsys.readouterr() == ("", "")


# ── Streams ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batching", ["continuous", "static", "none"])
def test_streams_that_take_turns_are_what_each_is_alone(open_llm, alone, batching):
    llm = open_llm(batching)
    texts, params = TEXTS[4:], [SamplingParams(seed=1, max_tokens=15), PARAMS[5], greedy(4)]
    streams = [llm.stream(text, each) for text, each in zip(texts, params)]
    pieces = list(zip(*zip_longest(*streams, fillvalue="")))
    assert streams[1].output.finish_reason == "stop", "at a text of two tokens"
    for text, each, stream, parts in zip(texts, params, streams, pieces):
        wanted, = alone.generate(text, each)
        assert answers(stream.output) == answers(wanted)
        assert "".join(parts) == wanted.text
        assert stream.output.metrics.num_output_tokens == len(wanted.token_ids)
    if batching == "continuous":
        assert_empty(llm)


def test_streams_share_the_steps(open_llm, monkeypatch):
    """Ten tokens for each of two, in the steps of one; who has read ahead finds text waiting."""
    llm = open_llm()
    first, second = (iter(llm.stream(text, greedy(10))) for text in ("ab", "cd"))
    calls = interrupt_at(monkeypatch, llm, call=0)
    next(first)
    next(second)
    list(first)
    assert len(list(second)) > 1
    assert calls == [2, 1 + 2] + [1 + 1] * 8 + [1]


def test_generate_while_a_stream_is_half_way(llm, alone):
    stream = llm.stream("The sky is", SamplingParams(seed=8, max_tokens=25))
    pieces = iter(stream)
    said = next(pieces)
    between = llm.generate(TEXTS, PARAMS)
    for text, params, output in zip(TEXTS, PARAMS, between):
        assert answers(output) == answers(alone.generate(text, params)[0])
    assert len(stream.output.token_ids) > 5, "it went on meanwhile"
    said += "".join(pieces)
    wanted, = alone.generate("The sky is", SamplingParams(seed=8, max_tokens=25))
    assert (said, stream.output.text) == (wanted.text, wanted.text)
    assert_empty(llm)


@pytest.mark.parametrize("way_out", ["break", "close", "forget"])
def test_a_stream_that_is_dropped_frees_its_blocks_at_once(llm, alone, way_out):
    blocks, other = llm.engine.scheduler.blocks, llm.stream("other", greedy(15))
    stream = llm.stream("x" * 30, greedy(20))
    other_pieces, pieces = iter(other), iter(stream)
    said = next(other_pieces)
    next(pieces)
    held = blocks.num_blocks - blocks.num_available_blocks
    assert held >= 30 / blocks.block_size
    if way_out == "close":
        stream.close()
        assert list(pieces) == [], "what was closed says no more"
    elif way_out == "forget":
        output = stream.output
        del stream, pieces
        gc.collect()
    else:
        pieces.close()  # what leaving a loop does
    still_held = blocks.num_blocks - blocks.num_available_blocks
    assert still_held == len(llm.engine.scheduler.running[0].block_table.block_ids) < held
    output = output if way_out == "forget" else stream.output
    assert output.finish_reason is None
    assert output.metrics.num_output_tokens == len(output.token_ids) > 0
    said += "".join(other_pieces)
    assert said == other.output.text == alone.generate("other", greedy(15))[0].text
    assert_empty(llm)


def test_a_stream_that_is_never_read_costs_nothing(llm):
    streams = [llm.stream("x" * 40, greedy(9)) for _ in range(50)]
    assert_empty(llm)
    assert len(llm.generate("a", greedy(3))[0].token_ids) == 3
    assert_empty(llm)
    streams[0].close()
    assert list(streams[0]) == [] and streams[0].output.token_ids == []
    assert len("".join(streams[1])) == len(streams[1].output.text) > 0


def test_a_failed_step_costs_the_reader_its_stream_and_nobody_else(llm, alone, monkeypatch):
    reader, other = (llm.stream(text, greedy(12)) for text in ("reader", "other"))
    pieces, other_pieces = iter(reader), iter(other)
    said = next(other_pieces)
    next(pieces)
    with monkeypatch.context() as patch:
        interrupt_at(patch, llm, call=1, error=FloatingPointError("overflow"))
        with pytest.raises(FloatingPointError):
            list(pieces)
    assert reader.output.finish_reason is None
    said += "".join(other_pieces)
    assert said == alone.generate("other", greedy(12))[0].text
    assert_empty(llm)


# ── Conversations ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batching", ["continuous", "static", "none"])
def test_a_second_turn(open_llm, alone, batching):
    options = {"block_size": 4, "max_num_batched_tokens": 64} if batching == "continuous" else {}
    llm = open_llm(batching, **options)
    conversation = llm.conversation("Be brief.")
    first = finish(conversation.say("What is the capital of France?", greedy(10)))
    second = finish(conversation.say("And of Italy?", greedy(10)))
    wanted = alone.chat(conversation.messages[:-1], greedy(10))
    assert answers(second) == answers(wanted)
    assert [message["role"] for message in conversation.messages] == [
        "system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[2]["content"] == first.text
    num_cached_tokens = second.metrics.num_cached_tokens
    if batching == "continuous":  # all of the first turn that fills blocks; its text may be other
        assert num_cached_tokens >= len(first.prompt_token_ids) // 4 * 4  # tokens than were drawn
    else:
        assert num_cached_tokens == 0


def test_turns_that_are_broken_off(open_llm, alone, monkeypatch):
    """By the listener, by Ctrl-C in a step, by the next message: it goes on from what was said."""
    llm = open_llm(**{**NARROW, "num_blocks": 50})
    conversation = llm.conversation()
    answer = conversation.say("one", greedy(20))
    said = next(answer) + next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    assert_empty(llm)
    with monkeypatch.context() as patch:
        interrupt_at(patch, llm, call=9)
        with pytest.raises(KeyboardInterrupt):
            finish(conversation.say("two", greedy(20)))
    assert conversation.messages[-1]["content"] != ""
    assert len(conversation.messages) == 4
    assert_empty(llm)
    put_aside = conversation.say("3", greedy(9))
    next(put_aside)
    output = finish(conversation.say("4", greedy(9)))
    assert list(put_aside) == []
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 4
    assert answers(output) == answers(alone.chat(conversation.messages[:-1], greedy(9)))
    assert_empty(llm)


# ── Interrupts and refusals ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [1, 2, 5, 12])
def test_ctrl_c_in_generate_leaves_the_engine_empty(llm, expected, monkeypatch, call):
    with monkeypatch.context() as patch:
        interrupt_at(patch, llm, call)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, PARAMS)
    assert_empty(llm)
    assert [answers(each) for each in llm.generate(TEXTS, PARAMS)] == [
        answers(each) for each in expected]


def test_ctrl_c_while_prompts_are_added_leaves_none_behind(llm, monkeypatch):
    add_request, added = llm.engine.add_request, []

    def interrupted(request):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(add_request(request))
        return added[-1]

    monkeypatch.setattr(llm.engine, "add_request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["A", "B", "C"], greedy(5))
    assert len(added) == 2
    assert_empty(llm)


def test_a_stream_that_is_collected_in_the_middle_of_a_step(llm, alone, monkeypatch):
    """Python may close an abandoned generator at any allocation, also inside Engine.step."""
    stream = iter(llm.stream("x", greedy(20)))
    next(stream)
    forward = llm.runner.forward

    def collecting(*args):
        stream.close()
        return forward(*args)

    monkeypatch.setattr(llm.runner, "forward", collecting)
    output, = llm.generate(["A long time ago"], greedy(6))
    assert answers(output) == answers(alone.generate("A long time ago", greedy(6))[0])
    assert_empty(llm)


def test_a_stream_loses_no_text_when_another_request_breaks_a_step(llm, alone, monkeypatch):
    stream = llm.stream("A long time ago", greedy(12))
    pieces = iter(stream)
    text = next(pieces)
    add, calls = Answer.add, []

    def interrupted(answer, *args):
        calls.append(answer)
        if answer.request is not calls[0].request:  # the stream's own token is written already
            raise KeyboardInterrupt
        return add(answer, *args)

    monkeypatch.setattr(Answer, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x"], greedy(6))
    monkeypatch.undo()
    text += "".join(pieces)
    assert text == stream.output.text == alone.generate("A long time ago", greedy(12))[0].text


def test_ctrl_c_in_generate_spares_a_stream_beside_it(llm, alone, monkeypatch):
    stream = llm.stream("The sky is", greedy(25))
    pieces = iter(stream)
    said = next(pieces)
    with monkeypatch.context() as patch:
        interrupt_at(patch, llm, call=4)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, PARAMS)
    said += "".join(pieces)
    assert said == alone.generate("The sky is", greedy(25))[0].text
    assert_empty(llm)


def refusal(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("bad, params, reason", [
    ("", greedy(3), "prompt is empty"),
    ([1, 9999], greedy(3), "token id 9999"),
    ("x" * 256, greedy(3), "context of 256"),
    ("x" * 90, greedy(7), "90 tokens and an answer of up to 7 cannot fit in the KV cache of 24 "
                          "blocks of 4: shorten them, or raise num_blocks"),
    ("x", SamplingParams(max_tokens=96, n=2), "1 tokens and an answer of up to 96 cannot fit"),
    ("x", SamplingParams(logit_bias={300: 1}), "token 300"),
])
def test_one_bad_prompt_among_many_runs_nothing(llm, monkeypatch, bad, params, reason):
    calls = interrupt_at(monkeypatch, llm, call=0)
    prompts = ["a", "b", bad, "c"]
    assert reason in refusal(llm.generate, prompts, [greedy(3), greedy(3), params, greedy(3)])
    assert calls == []
    assert_empty(llm)
    assert reason in refusal(llm.stream, bad, params if params.n == 1 else greedy(96))


def test_what_just_fits_is_answered(llm, alone):
    """95 tokens of prompt, and one of answer: all 24 blocks."""
    long, short = llm.generate(["x" * 95, "y"], [greedy(1), greedy(5)])
    assert len(long.token_ids) == 1
    assert answers(short) == answers(alone.generate("y", greedy(5))[0])
    output, = llm.generate("x", greedy(95, ignore_eos=True))
    assert len(output.token_ids) == 95
    assert_empty(llm)


@pytest.mark.parametrize("options, reason", [
    ({"batching": "dynamic"}, "batching 'dynamic' is unknown: choose one of continuous, static, "
                              "none"),
    ({"batching": None}, "batching None is unknown"),
    ({"batching": "static", "kv_dtype": "int8"}, "kv_dtype 'int8' is not for a static batch"),
    ({"max_num_seqs": 0}, "max_num_seqs is 0, must be an integer of at least 1"),
    ({"max_num_seqs": 513}, "max_num_batched_tokens is 512, must be at least max_num_seqs"),
    ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens is 1.5, must be an integer"),
    ({"block_size": True}, "block_size is True, must be an integer"),
    ({"block_size": "16"}, "block_size is '16', must be an integer"),
    ({"num_blocks": -1}, "num_blocks is -1, must be an integer of at least 1"),
    ({"max_num_seqs": None}, "max_num_seqs is None, must be an integer"),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1, must be True or False"),
])
def test_a_wrong_option_is_refused(open_llm, options, reason):
    assert reason in refusal(open_llm, **options)


def test_an_unknown_option_is_a_type_error(open_llm):
    with pytest.raises(TypeError, match="max_seqs"):
        open_llm(max_seqs=3)


def test_the_engine_is_made_when_the_first_request_comes(open_llm):
    llm = open_llm()
    assert llm.logits([1, 2, 3]).shape == (3, 257)
    assert "engine" not in vars(llm)
    llm.generate("a", greedy(1))
    assert llm.engine is llm.engine
    token_bytes = 2 * 3 * 20 * 8  # keys and values, L, K·D, float64
    assert llm.engine.scheduler.blocks.num_blocks == 2**30 // (16 * token_bytes)


@pytest.mark.parametrize("batching, option", [("none", "max_num_seqs"), ("static", "num_blocks")])
def test_an_option_that_nobody_would_read_is_refused(open_llm, batching, option):
    with pytest.raises(InputError, match=f"{option} is not for batching '{batching}'"):
        open_llm(batching, **{option: 9})

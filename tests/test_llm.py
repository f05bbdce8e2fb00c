"""The front door: what LLM promises about tokens, seeds, conversations, memory and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from checkpoints import write_checkpoint

from minillm import LLM, InputError, SamplingParams
from minillm.loading.gguf import GGUFFile
from minillm.sampling import probabilities_np, request_rng

ROOT = Path(__file__).parents[1]
GAP = 5e-3  # logits nearer than this may change places between two orders of the same sums
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, in a small village by the sea,"


def greedy(max_tokens, **others):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


@pytest.fixture(params=["torch", "numpy"])
def llm(request):
    return request.getfixturevalue(f"llm_{request.param}")


def write_chat_model(folder, chat_template="{{ messages[0].content }}", **overrides):
    """A tiny random model with a tokenizer of single bytes; token 256 is <end>."""
    write_checkpoint(folder, "LlamaForCausalLM", vocab_size=257, eos_token_id=256, **overrides)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([""], vocab_size=257, special_tokens=[])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("chat_model"), max_position_embeddings=24)


def assert_best_tokens(llm, prompt_token_ids, token_ids):
    """Every token is the best of logits that are computed anew, or as good as the best."""
    for t, token in enumerate(token_ids):
        logits = llm.logits(prompt_token_ids + token_ids[:t])[-1]
        assert logits.max() - logits[token] < GAP, f"token {t} is not the best"


def assert_same_choices(llm, prompt_token_ids, token_ids, others):
    """Two greedy answers are the same, or part where two tokens were equally good."""
    if token_ids != others:
        assert_best_tokens(llm, prompt_token_ids, token_ids)
        assert_best_tokens(llm, prompt_token_ids, others)


# ---- greedy ----------------------------------------------------------------------------------


def test_greedy_tokens_equal_a_loop_without_cache(llm):
    output, = llm.generate(STORY, greedy(6))
    assert len(output.token_ids) == 6
    assert_best_tokens(llm, output.prompt_token_ids, output.token_ids)


@pytest.mark.parametrize("prompt", [STORY, "def fibonacci(n):\n", "1, 2, 3, 5, 8,"])
def test_numpy_and_torch_write_the_same_tokens(llm_numpy, llm_torch, prompt):
    output, = llm_numpy.generate(prompt, greedy(8))
    twin, = llm_torch.generate(prompt, greedy(8))
    assert_same_choices(llm_numpy, output.prompt_token_ids, output.token_ids, twin.token_ids)


@pytest.fixture(scope="module")
def transformers_model(model_path, llm_torch):
    """The model of transformers, with the numbers of our file (test_gguf checks the numbers)."""
    c, file = llm_torch.config, GGUFFile(model_path)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta, max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    numbers = {name: torch.from_numpy(np.array(file.tensor(name, tuple(parameter.shape))))
               for name, parameter in model.named_parameters()}
    model.load_state_dict(numbers, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def test_greedy_tokens_equal_those_of_transformers(llm_torch, transformers_model):
    output = llm_torch.chat(QUESTION, greedy(16))
    prompt = torch.tensor([output.prompt_token_ids])
    answer = transformers_model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                         do_sample=False, max_new_tokens=16)
    assert output.text == "The capital of France is Paris."
    assert_same_choices(llm_torch, output.prompt_token_ids, output.token_ids,
                        answer[0, prompt.shape[1]:].tolist())


# ---- seeds -----------------------------------------------------------------------------------


SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=8)


@pytest.fixture(scope="module")
def seeded_text(llm_numpy):
    return llm_numpy.generate(STORY, SEEDED)[0].text


def test_the_same_seed_writes_the_same_text_whatever_ran_before(llm_numpy, seeded_text):
    llm_numpy.generate("Something else", SamplingParams(seed=1, max_tokens=3))
    between, again = llm_numpy.generate(["Else", STORY], [SamplingParams(max_tokens=3), SEEDED])
    assert again.text == seeded_text
    assert between.text != seeded_text


def test_streams_that_take_turns_do_not_disturb_each_other(llm_numpy, seeded_text):
    stream = llm_numpy.stream(STORY, SEEDED)
    other = llm_numpy.stream("The sky", SamplingParams(seed=8, max_tokens=8))
    for _ in zip_longest(stream, other):
        pass
    assert stream.output.text == seeded_text
    assert len(other.output.token_ids) == 8


def test_another_seed_writes_another_text(llm_numpy, seeded_text):
    other = SamplingParams(temperature=0.9, top_p=0.95, seed=8, max_tokens=8)
    assert llm_numpy.generate(STORY, other)[0].text != seeded_text


def test_completions_of_one_request_differ_and_can_be_repeated(llm_numpy, seeded_text):
    def texts(n):
        params = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=8, n=n)
        return [completion.text for completion in llm_numpy.generate(STORY, params)[0].outputs]

    three = texts(3)
    assert three[0] == seeded_text
    assert len(set(three)) == 3
    assert texts(2) == three[:2]


def test_without_a_seed_every_text_is_another(llm_numpy):
    params = SamplingParams(temperature=1.5, max_tokens=6, n=2)
    first, second = llm_numpy.generate(STORY, params)[0].outputs
    assert first.text != second.text


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_numpy_and_torch_draw_the_same_tokens(llm_numpy, llm_torch, seed):
    params = SamplingParams(temperature=1.2, top_k=200, min_p=0.01, seed=seed, max_tokens=8)
    output, = llm_numpy.generate(STORY, params)
    drawn, = llm_torch.generate(STORY, params)
    same = [a == b for a, b in zip(output.token_ids, drawn.token_ids)]
    if not all(same):  # then u fell on the border between two tokens
        t = same.index(False)
        u = request_rng(seed, 0).random(t + 1)[t]
        logits = llm_numpy.logits(output.prompt_token_ids + output.token_ids[:t])[-1]
        assert abs(np.cumsum(probabilities_np(logits, params)) - u).min() < 1e-4


# ---- stopping, text, logprobs ----------------------------------------------------------------


def test_min_tokens_keeps_the_model_from_ending(llm_numpy):
    output = llm_numpy.chat(QUESTION, greedy(12, min_tokens=12))
    assert len(output.token_ids) == 12
    assert not set(output.token_ids) & set(llm_numpy.stop_token_ids)
    assert output.text.startswith("The capital of France is Paris.")


def test_ignore_eos_goes_on_after_the_end(llm_numpy):
    output = llm_numpy.chat(QUESTION, greedy(12, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (12, "length")
    assert set(output.token_ids) & set(llm_numpy.stop_token_ids)
    assert "<|im_end|>" not in output.text


def test_a_stop_string_cuts_the_text(llm_numpy):
    output = llm_numpy.chat(QUESTION, greedy(12, stop=["France is", "no such text"]))
    assert (output.text, output.finish_reason) == ("The capital of ", "stop")


def test_a_stream_joins_to_the_text_and_never_shows_half_a_character(llm_numpy):
    stream = llm_numpy.stream("Smileys: 😀😀😀😀😀😀", greedy(9))
    pieces = list(stream)
    assert "".join(pieces) == stream.output.text
    assert stream.output.text == llm_numpy.tokenizer.decode(stream.output.token_ids)
    assert pieces == ["😀", "😀", "😀"]  # three tokens each


def test_a_stream_that_is_left_early_has_metrics(llm_numpy):
    stream = llm_numpy.stream(STORY, greedy(8))
    for _ in stream:
        break
    assert stream.output.metrics.num_output_tokens == len(stream.output.token_ids) == 1


def test_logprobs_are_those_of_the_logits(llm):
    output, = llm.generate(STORY, SamplingParams(seed=3, max_tokens=4, logprobs=5))
    logits = llm.logits(output.prompt_token_ids + output.token_ids)
    for t, (token, reported) in enumerate(zip(output.token_ids, output.logprobs)):
        row = logits[len(output.prompt_token_ids) - 1 + t].astype(np.float64)
        row -= np.log(np.exp(row).sum())
        assert next(iter(reported)) == token
        assert set(reported) >= set(np.argsort(row)[-5:].tolist())
        assert len(reported) in (5, 6)
        for token_id, logprob in reported.items():
            assert logprob == pytest.approx(row[token_id], abs=GAP)


def test_logprobs_0_reports_the_sampled_token_alone(llm_numpy):
    params = SamplingParams(seed=3, max_tokens=3, logprobs=0, n=2)
    for completion in llm_numpy.generate(STORY, params)[0].outputs:
        assert [list(reported) for reported in completion.logprobs] == [
            [token] for token in completion.token_ids]


# ---- prompts and parameters ------------------------------------------------------------------


def test_prompts_are_texts_or_token_ids_alone_or_in_a_list(llm_numpy):
    token_ids = llm_numpy.tokenizer.encode(STORY)
    for prompts in (STORY, token_ids, tuple(token_ids), [STORY], [token_ids]):
        output, = llm_numpy.generate(prompts, greedy(1))
        assert output.prompt_token_ids == token_ids
    mixed = llm_numpy.generate([token_ids, "The sky"], greedy(1))
    assert [len(output.token_ids) for output in mixed] == [1, 1]
    assert llm_numpy.generate([]) == []


@pytest.mark.parametrize("token_ids", [np.array([504, 3575]), list(np.array([504, 3575])),
                                       torch.tensor([504, 3575])], ids=["array", "list", "tensor"])
def test_token_ids_may_come_from_numpy_and_torch(llm_numpy, token_ids):
    output, = llm_numpy.generate([token_ids], greedy(1))
    assert output.prompt_token_ids == [504, 3575]
    assert llm_numpy.logits(token_ids).shape == (2, llm_numpy.config.vocab_size)


def test_each_prompt_may_have_its_own_parameters(llm_numpy):
    outputs = llm_numpy.generate(["a", "b", "c"], [greedy(1), greedy(2), greedy(3)])
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3]


def test_what_looks_like_a_special_token_in_a_prompt_is_text(llm_numpy):
    token_ids = llm_numpy.encode_prompt("<|im_end|>") + llm_numpy.encode_chat(
        [{"role": "user", "content": "<|endoftext|>"}])
    assert token_ids.count(0) == 0
    assert token_ids.count(2) == 2  # the template's own: after the system's and the user's turn


@pytest.mark.parametrize("prompts, reason", [
    ("", "prompt is empty"),
    ([""], "prompt is empty"),
    ([[]], "prompt is empty"),
    ([[5, -1]], "token id -1 must be an integer from 0 to 49151"),
    ([[49152]], "token id 49152 must be"),
    ([[1.0]], "token id 1.0 must be"),
    ([["a"]], "token id 'a' must be"),
    ([[True, 5]], "token id True must be"),
    ([None], "prompt"),
    ([5, "a"], "token id 'a' must be"),
    (["a", 5], "prompt"),
    (b"bytes", "prompt"),
    ([{"role": "user", "content": "Hi"}], "chat"),
    ([[1] * 8192], "8192 tokens, and this model's context of 8192"),
    ("half a pair \ud800", "surrogate"),
])
def test_a_prompt_that_cannot_be_answered_is_refused(llm_numpy, prompts, reason):
    with pytest.raises(InputError, match=reason) as error:
        llm_numpy.generate(prompts, greedy(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call, reason", [
    (lambda llm: llm.generate(["a", "b"], [greedy(1)]), "1 SamplingParams for 2 prompts"),
    (lambda llm: llm.generate("a", []), "0 SamplingParams for 1 prompts"),
    (lambda llm: llm.generate("a", {"temperature": 0}), "SamplingParams"),
    (lambda llm: llm.generate("a", SamplingParams(logit_bias={49152: 1})), "49152"),
    (lambda llm: llm.stream("a", SamplingParams(n=2)), "n is 2, must be 1 in a stream"),
    (lambda llm: llm.stream(""), "prompt is empty"),
    (lambda llm: llm.logits([]), "empty"),
    (lambda llm: llm.logits([-1]), "token id -1"),
    (lambda llm: llm.logits([1] * 8193), "8193 tokens do not fit"),
    (lambda llm: llm.chat([]), "messages must be a list"),
    (lambda llm: llm.chat("Hi"), "messages must be a list"),
    (lambda llm: llm.chat([{"role": "user"}]), 'keys "role" and "content"'),
])
def test_a_wrong_call_is_refused(llm_numpy, call, reason):
    with pytest.raises(InputError, match=reason) as error:
        call(llm_numpy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, reason", [
    ({"model": "no-such-model"}, "no-such-model"),
    ({"backend": "jax"}, "backend 'jax' is unknown"),
    ({"device": "tpu"}, "device 'tpu' is unknown"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
    ({"device": "cuda:-1"}, "device 'cuda:-1'"),
    ({"device": None}, "device None"),
    ({"dtype": "float8"}, "dtype 'float8' is unknown"),
    ({"backend": "numpy", "device": "cuda"}, "device 'cuda' is not for NumPy"),
    ({"backend": "numpy", "dtype": "bfloat16"}, "dtype 'bfloat16' is not for NumPy"),
    ({"quantize": "int3"}, "quantize='int3'"),
])
def test_an_unknown_option_is_refused(chat_model, options, reason):
    with pytest.raises(InputError, match=reason) as error:
        LLM(**{"model": chat_model, **options})
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_cuda_where_there_is_none_is_refused(chat_model):
    with pytest.raises(InputError, match="device 'cuda' is not there: PyTorch sees 0 CUDA devices"):
        LLM(chat_model, device="cuda")


# ---- a small model ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_an_answer_ends_where_the_context_ends(chat_model, backend):
    llm = LLM(chat_model, backend=backend, device="cpu", dtype="float32")
    output, = llm.generate("x" * 20, greedy(100, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (24 - 20, "length")
    output, = llm.generate("x" * 23, greedy(100))
    assert len(output.token_ids) == 1
    with pytest.raises(InputError, match="24 tokens, and this model's context of 24"):
        llm.generate("x" * 24, greedy(1))


def test_a_model_without_a_chat_template_says_so(tmp_path):
    llm = LLM(write_chat_model(tmp_path, chat_template=None), backend="numpy")
    with pytest.raises(InputError, match="has no chat template"):
        llm.chat(QUESTION)
    assert llm.generate("it continues texts", greedy(1))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model that knows 260 tokens, 3 more than its tokenizer, as Qwen's do."""
    folder = write_chat_model(tmp_path_factory.mktemp("padded"))
    write_checkpoint(folder, "LlamaForCausalLM", vocab_size=260, eos_token_id=256)
    return LLM(folder, backend="numpy")


def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn(padded):
    output, = padded.generate("a", SamplingParams(temperature=1e6, max_tokens=200, seed=1))
    assert max(output.token_ids) <= 256


@pytest.mark.parametrize("prompt, options", [
    ("a", {"logit_bias": {259: 100}}),
    ([[259]], {"repetition_penalty": 2.0}),
])
def test_tokens_that_the_tokenizer_does_not_know_are_refused(padded, prompt, options):
    with pytest.raises(InputError, match="259"):
        padded.generate(prompt, SamplingParams(max_tokens=1, **options))


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path):
    write_chat_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps({**config, "eos_token_id": 5000}))
    with pytest.raises(InputError, match="5000"):
        LLM(tmp_path, backend="numpy").generate("a", greedy(2, min_tokens=1))


# ---- conversations ---------------------------------------------------------------------------


def finish(answer):
    """Read all of `conversation.say(...)`; -> its RequestOutput."""
    while True:
        try:
            next(answer)
        except StopIteration as end:
            return end.value


def assert_goes_on_like_a_fresh_chat(llm, conversation):
    """The next answer is the one that a chat gives which computes every message anew."""
    output = finish(conversation.say("And of Italy?", greedy(6)))
    fresh = llm.chat(conversation.messages[:-1], greedy(6))
    assert output.prompt_token_ids == fresh.prompt_token_ids
    assert_same_choices(llm, fresh.prompt_token_ids, output.token_ids, fresh.token_ids)
    assert conversation.messages[-1] == {"role": "assistant", "content": output.text}
    return output


@pytest.fixture
def fresh(llm):
    """The model behind an engine whose cache knows no prompt of another test."""
    llm.__dict__.pop("engine", None)  # the next request makes a new one
    return llm


def full_blocks(llm, num_tokens):
    """How many of so many tokens stand in blocks that are full, and so can be found again."""
    return num_tokens // llm.engine_config.block_size * llm.engine_config.block_size


def test_a_second_turn_computes_only_what_is_new(fresh):
    conversation = fresh.conversation()
    first = finish(conversation.say(QUESTION[0]["content"], greedy(12)))
    second = finish(conversation.say("And of Italy?", greedy(6)))
    said = len(first.prompt_token_ids) + len(first.token_ids)
    assert first.metrics.num_cached_tokens == 0
    # The end token was not taken through, and the last tokens fill no block.
    assert second.metrics.num_cached_tokens == full_blocks(fresh, said - 1)
    assert second.metrics.num_cached_tokens > len(second.prompt_token_ids) / 2
    fresh.__dict__.pop("engine")  # now everything is computed anew
    anew = fresh.chat(conversation.messages[:-1], greedy(6))
    assert anew.metrics.num_cached_tokens == 0
    assert_same_choices(fresh, anew.prompt_token_ids, second.token_ids, anew.token_ids)


def test_the_system_message_comes_first(llm_numpy):
    conversation = llm_numpy.conversation("You are a pirate.")
    output = finish(conversation.say("Hello", greedy(1)))
    assert "You are a pirate." in llm_numpy.tokenizer.decode(output.prompt_token_ids)


def test_an_answer_closed_half_way_is_remembered_as_far_as_it_came(llm_numpy):
    conversation = llm_numpy.conversation()
    answer = conversation.say(QUESTION[0]["content"], greedy(12))
    said = next(answer) + next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    output = assert_goes_on_like_a_fresh_chat(llm_numpy, conversation)
    assert output.metrics.num_cached_tokens >= full_blocks(llm_numpy, 37)  # the first prompt


def test_an_answer_put_aside_half_way_does_not_disturb_the_next(llm_numpy):
    conversation = llm_numpy.conversation()
    put_aside = conversation.say(QUESTION[0]["content"], greedy(12))
    next(put_aside)
    answer = conversation.say("And of Italy?", greedy(6))
    next(answer)
    assert list(put_aside) == [], "the conversation went on without it"
    output = finish(answer)
    fresh = llm_numpy.chat(conversation.messages[:-1], greedy(6))
    assert_same_choices(llm_numpy, fresh.prompt_token_ids, output.token_ids, fresh.token_ids)


@pytest.mark.parametrize("backend, call", [
    ("numpy", 1), ("numpy", 17), ("numpy", 30), ("numpy", 31), ("numpy", 149),
    ("torch", 17), ("torch", 45)])
def test_an_interrupt_in_any_layer_leaves_a_whole_conversation(request, monkeypatch, backend, call):
    """30 layers: calls 1 to 30 of the cache are the prompt's, each 30 after that a token's."""
    llm = request.getfixturevalue(f"llm_{backend}")
    llm.__dict__.pop("engine", None)
    conversation, write, calls = llm.conversation(), llm.engine.cache.write, []

    def write_until_interrupted(*args):
        write(*args)
        calls.append(args[0])
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.cache, "write", write_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(conversation.say(QUESTION[0]["content"], greedy(12)))
    assert len(calls) == call
    assert len(conversation.messages) == 2
    llm.engine.scheduler.blocks.check_integrity([])
    output = assert_goes_on_like_a_fresh_chat(llm, conversation)
    if call <= 30:  # what broke off in the prompt is known to nobody
        assert output.metrics.num_cached_tokens == 0


@pytest.mark.parametrize("text, params", [
    ("word " * 9000, None), ("Hi", SamplingParams(n=2)), (5, None), ("Hi", "params")])
def test_a_refused_message_leaves_no_trace(llm_numpy, text, params):
    conversation = llm_numpy.conversation()
    finish(conversation.say(QUESTION[0]["content"], greedy(3)))
    messages = list(conversation.messages)
    with pytest.raises(InputError):
        finish(conversation.say(text, params))
    assert conversation.messages == messages
    assert_goes_on_like_a_fresh_chat(llm_numpy, conversation)


def test_messages_may_be_rewritten_between_turns(llm_numpy):
    conversation = llm_numpy.conversation()
    finish(conversation.say(QUESTION[0]["content"], greedy(6)))
    conversation.messages[0] = {"role": "user", "content": "What is the capital of Spain?"}
    assert_goes_on_like_a_fresh_chat(llm_numpy, conversation)
    for _ in range(2):  # the second time, the whole prompt is in the cache
        conversation.messages.clear()
        assert_goes_on_like_a_fresh_chat(llm_numpy, conversation)


# ---- a fresh process -------------------------------------------------------------------------


PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("backend, dtype, bytes_a_weight", [
    ("torch", "float32", 4), ("torch", "bfloat16", 2), ("numpy", "float32", 4)])
def test_a_process_that_answers_holds_the_weights_once(model_path, llm_numpy, backend, dtype,
                                                       bytes_a_weight):
    module = backend
    interpreter_bytes = int(printed(
        f"import minillm, {module} as xp; a = xp.ones((64, 64)); a @ a; {PEAK}"))
    peak_bytes = int(printed(
        f"from minillm import LLM, SamplingParams; llm = LLM({str(model_path)!r}, {backend!r}, "
        f"'cpu', {dtype!r}); llm.generate('Hi', SamplingParams(max_tokens=4)); {PEAK}"))
    weights = llm_numpy.runner.weights
    num_weights = weights.embed_tokens.weight.size + sum(
        getattr(layer, name).weight.size for layer in weights.layers
        for name in ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    assert peak_bytes <= 2.2 * num_weights * bytes_a_weight + interpreter_bytes


def test_the_numpy_backend_does_not_import_torch(chat_model):
    assert printed(f"import sys; from minillm import LLM; LLM({str(chat_model)!r}, 'numpy')"
                   ".generate('Hi'); print('torch._C' in sys.modules)") == "False"

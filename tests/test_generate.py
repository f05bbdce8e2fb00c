"""The loop of one request, driven by a model that says what the test wants it to say."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import SamplingParams
from minillm.generate import generate, prefill
from minillm.request import Request

END = b"<end>"  # the script's word for the token that ends a text


class Script:
    """A tokenizer and a runner in one: token i is the i-th piece (bytes or text), END is special.

    `forward` checks that positions follow the cache, and keeps (first position, tokens, rows) of
    each call in `calls`.
    """

    vocab_size = 5  # of the logits, which nobody reads

    def __init__(self, pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        self.special_tokens = {END.decode(): self.end_id}
        self.to_say = iter(range(len(self.pieces)))
        self.calls = []

    @property
    def end_id(self):
        return self.pieces.index(END) if END in self.pieces else len(self.pieces)

    def token_bytes(self, token):
        return self.pieces[token]

    def forward(self, tokens, positions, cache, rows):
        assert positions == list(range(cache.length, cache.length + len(tokens)))
        cache.length += len(tokens)
        assert cache.length <= cache.capacity
        self.calls.append((positions[0], tokens, rows))
        return np.full((len(rows), self.vocab_size), len(self.calls))

    def sample(self, logits, params, u, prompt_token_ids, output_token_ids, stop_token_ids):
        return next(self.to_say)

    def top_logprobs(self, logits, token, num):
        return {token: -float(num)}


@dataclass
class Cache:
    """All that the loop knows of a cache."""

    capacity: int
    length: int = 0

    def truncate(self, length):
        assert length <= self.length
        self.length = length


def steps_of(script, prompt_token_ids=(7, 8, 9), capacity=1000, cache=None, **params):
    """-> (the steps of generate, the output that they fill in)"""
    params = SamplingParams(**{"max_tokens": 100, **params})
    request = Request(list(prompt_token_ids), params, (script.end_id,))
    return generate(script, script, request, cache or Cache(capacity)), request.output


def answer(pieces, **options):
    """-> (texts shown, one a token; the output)"""
    steps, output = steps_of(Script(pieces), **options)
    return [text for _, text in steps], output


# ---- where an answer ends --------------------------------------------------------------------


def test_the_end_token_ends_it_and_is_no_text():
    shown, output = answer(["Hi", "!", END, "more"])
    assert shown == ["Hi", "!", ""]
    assert (output.text, output.token_ids, output.finish_reason) == ("Hi!", [0, 1, 2], "stop")


def test_max_tokens_ends_it():
    _, output = answer(["a", "b", "c", END], max_tokens=2)
    assert (output.text, output.finish_reason) == ("ab", "length")


def test_one_token_is_a_whole_answer():
    _, output = answer(["a", "b"], max_tokens=1)
    assert (output.text, output.finish_reason, output.metrics.tpot_ms) == ("a", "length", None)


def test_the_end_of_the_context_ends_it():
    script = Script("abcdef")
    steps, output = steps_of(script, capacity=3 + 2)
    list(steps)
    assert (output.text, output.finish_reason) == ("ab", "length")


def test_the_last_token_is_not_taken_through_the_model():
    script = Script(["a", "b", END])
    list(steps_of(script)[0])
    assert [tokens for _, tokens, _ in script.calls] == [[7, 8, 9], [0], [1]]


def test_ignore_eos_goes_on_and_shows_no_end_token():
    shown, output = answer(["a", END, "b", "c"], ignore_eos=True, max_tokens=3)
    assert shown == ["a", "", "b"]
    assert (output.text, output.finish_reason) == ("ab", "length")


@pytest.mark.parametrize("pieces, text", [
    (["yes", " #", "#", "# no"], "yes "),
    (["###", "no"], ""),
    (["#", "#", "#"], ""),
    (["a### b###"], "a"),
])
def test_a_stop_string_ends_it_wherever_its_tokens_are_cut(pieces, text):
    shown, output = answer(pieces, stop="###")
    assert "".join(shown) == output.text == text
    assert (output.finish_reason, output.token_ids) == ("stop", list(range(len(shown))))


def test_nothing_is_sampled_after_a_stop_string():
    _, output = answer(["a", ".", "b"], stop=["!", "."])
    assert output.token_ids == [0, 1]


@pytest.mark.parametrize("last, reason", [(END, "stop"), ("##", "length")])
def test_text_held_back_for_a_stop_string_that_never_came_is_shown_at_the_end(last, reason):
    shown, output = answer(["a#", last], stop="####", max_tokens=2)
    assert "".join(shown) == output.text == "a#" + (last if last != END else "")
    assert output.finish_reason == reason


@pytest.mark.parametrize("pieces, text", [
    (["a.", "b", "c.", "d"], "a.bc"), (["a.", "b.", "c."], "a.b")])
def test_a_stop_string_before_min_tokens_is_text(pieces, text):
    _, output = answer(pieces, stop=".", min_tokens=2)
    assert (output.text, output.finish_reason) == (text, "stop")


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_it_is_found():
    shown, output = answer(["a#", "#", "#b"], stop="###", min_tokens=2, max_tokens=3)
    assert "".join(shown) == output.text == "a"
    assert output.finish_reason == "stop"


def test_min_tokens_beyond_the_context_ends_with_the_context():
    _, output = answer("abcdef", capacity=3 + 2, min_tokens=50)
    assert (output.text, output.finish_reason) == ("ab", "length")


# ---- text ------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_comes_whole():
    shown, _ = answer([b"\xf0", b"\x9f\x98", b"\x80!", END])
    assert shown == ["", "", "😀!", ""]


@pytest.mark.parametrize("last", [END, b"\x9f"])
def test_a_character_that_stays_unfinished_becomes_a_replacement(last):
    _, output = answer(["a", b"\xf0\x9f", last], max_tokens=3)
    assert output.text == "a�"


def test_a_stop_string_of_one_character_in_four_tokens():
    _, output = answer([b"a", b"\xf0", b"\x9f", b"\x98", b"\x80"], stop="😀")
    assert (output.text, output.finish_reason) == ("a", "stop")


texts = st.text("aé😀", max_size=12)


@given(texts, st.lists(st.integers(0, 40), max_size=6), st.lists(texts.filter(bool), max_size=2))
def test_the_pieces_join_to_the_text_whatever_the_tokens(text, cuts, stop):
    data = text.encode()
    cuts = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    pieces = [data[start:end] for start, end in zip(cuts, cuts[1:])]
    shown, output = answer([*pieces, END], stop=stop)
    expected = text
    for end in range(len(text) + 1):
        claimed = [len(string) for string in stop if text[:end].endswith(string)]
        if claimed:
            expected = text[: end - max(claimed)]
            break
    assert "".join(shown) == output.text == expected


# ---- prompt, cache, completions --------------------------------------------------------------


def test_a_prompt_is_prefilled_in_chunks_and_only_its_last_token_gets_logits():
    script = Script([])
    logits = prefill(script, list(range(10)), Cache(10), chunk_size=4)
    assert script.calls == [(0, [0, 1, 2, 3], []), (4, [4, 5, 6, 7], []), (8, [8, 9], [-1])]
    assert logits.tolist() == [3] * 5  # of the third call


def test_what_the_cache_holds_is_not_computed_again():
    script = Script(["a", END])
    steps, output = steps_of(script, cache=Cache(100, length=2))
    list(steps)
    assert script.calls[0] == (2, [9], [-1])
    assert (output.metrics.num_cached_tokens, output.metrics.num_prompt_tokens) == (2, 3)


def test_every_completion_continues_the_same_prompt():
    script = Script("abcdef")
    steps, output = steps_of(script, n=3, max_tokens=2)
    assert [completion.index for completion, _ in steps] == [0, 0, 1, 1, 2, 2]
    assert [completion.text for completion in output.outputs] == ["ab", "cd", "ef"]
    calls = [(position, tokens) for position, tokens, _ in script.calls]
    assert calls == [(0, [7, 8, 9]), (3, [0]), (3, [2]), (3, [4])]


def test_logprobs_come_one_a_token():
    assert answer(["a", END], logprobs=4)[1].logprobs == [{0: -4.0}, {1: -4.0}]
    assert answer(["a", END])[1].logprobs is None


def test_the_output_is_right_at_every_moment_and_when_the_caller_stops_listening():
    steps, output = steps_of(Script(["a", "b", "c", END]))
    for completion, _ in steps:
        if len(completion.token_ids) == 2:
            break
    steps.close()
    assert (output.text, output.token_ids, output.finish_reason) == ("ab", [0, 1], None)
    assert output.metrics.num_output_tokens == 2

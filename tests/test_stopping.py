"""Stop strings are found wherever the text is cut into pieces, and nothing is shown too soon."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.stopping import StopStrings


def show(stop, pieces):
    """-> (what is shown after each piece and at the end, the stop string that was found)."""
    strings = StopStrings(tuple(stop))
    shown = []
    for piece in pieces:
        shown.append(strings.feed(piece))
        if strings.found is not None:
            return shown, strings.found
    return [*shown, strings.flush()], None


def plain_search(stop, text):
    """Read letter by letter; the first moment at which the text ends with a stop string ends it.

    Of several that end at that moment, the longest takes away what all of them claim.
    """
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("stop, pieces, shown, found", [
    (["###"], ["a#", "#", "#b"], ["a", "", ""], "###"),
    (["END"], ["END"], [""], "END"),
    (["END"], ["E", "N", "D"], ["", "", ""], "END"),
    (["END"], ["an EN", "TRY EN"], ["an ", "ENTRY ", "EN"], None),
    (["END"], ["no", "ne"], ["no", "ne", ""], None),
    (["aab"], ["aa", "ab"], ["", "a"], "aab"),
    (["."], ["a.b.c"], ["a"], "."),
    (["long stop", "stop"], ["a long ", "stop"], ["a ", ""], "long stop"),
    (["ab", "abc"], ["xa", "bc"], ["x", ""], "ab"),
    (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""], "\n\n"),
    ([], ["any", "thing"], ["any", "thing", ""], None),
])
def test_worked_by_hand(stop, pieces, shown, found):
    assert show(stop, pieces) == (shown, found)


def test_the_stop_string_that_is_complete_first_wins_however_the_text_is_cut():
    stop = ["abcd", "bc"]
    assert show(stop, "abcd") == (["", "", "a"], "bc")
    assert show(stop, ["abcd"]) == (["a"], "bc")


words = st.text("ab", min_size=1, max_size=4)
pieces_of_text = st.lists(st.text("ab", max_size=4), max_size=8)


@settings(max_examples=500)
@given(st.lists(words, max_size=3), pieces_of_text)
def test_any_cut_equals_a_search_in_the_whole_text(stop, pieces):
    shown, found = show(stop, pieces)
    assert ("".join(shown), found) == plain_search(stop, "".join(pieces))


@settings(max_examples=500)
@given(st.lists(words, max_size=3), pieces_of_text)
def test_text_is_held_back_only_while_a_stop_string_could_claim_it(stop, pieces):
    strings, text, shown = StopStrings(tuple(stop)), "", ""
    for piece in pieces:
        text, shown = text + piece, shown + strings.feed(piece)
        if strings.found is not None:
            break
        held = text[len(shown):]
        assert text.startswith(shown)
        assert not held or any(string.startswith(held) and string != held for string in stop)

"""The tokenizer against the library `tokenizers`, which is the oracle for every id."""

import copy
import json
import random
import unicodedata
from collections import Counter
from functools import lru_cache

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minillm.bpe import bpe_encode, bpe_encode_fast, bpe_train
from minillm.errors import InputError
from minillm.loading.gguf import GGUFFile
from minillm.pretokenizer import Pretokenizer
from minillm.tokenizer import IncrementalDecoder, Tokenizer
from minillm.unicode_versions import NEWER_THAN_UNICODE_16, normalize_nfc

TEXT = """
The quick brown fox jumps over the lazy dog; the dog, who isn't quick, didn't jump. They'll say
they've seen 12 foxes in 1984, or 1,024 of them. "We'RE here," he said: I'd've come at 10:30 p.m.

    def brown_fox(jumps=3):\n\t\treturn [fox ** 2 for fox in range(jumps)]  # over & over\r\n
Größe, naïve cafés, señor, Ελληνικά και αγγλικά, по-русски и по-английски, עברית, العربية,
हिन्दी में, 日本語のテキスト、中文文本。한국어 텍스트 👩‍👩‍👧 👍🏽 🇫🇷
— “quotes” … ½ ² Ⅷ ① ٣ ๔ e\u0301 A\u030a\u0323
""" * 3

# As the published tokenizer.json files have them, on purpose not taken from the code under test.
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
           r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def cut_of(family):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "gpt-2":
        return byte_level
    if family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    pattern = tokenizers.Regex(LLAMA_3 if family == "llama-bpe" else QWEN_2)
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@lru_cache
def oracle_json(family):
    """A small tokenizer of a family, trained and written by `tokenizers`."""
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = cut_of(family)
    oracle.decoder = decoders.ByteLevel()
    if family == "qwen2":
        oracle.normalizer = normalizers.NFC()
    oracle.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=560, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    oracle.add_special_tokens(["<|end|>", "<|end|><|end|>", "<|begin|>"])
    oracle.add_tokens([tokenizers.AddedToken("<tool>", normalized=False),
                       tokenizers.AddedToken("<t\u00e9>", normalized=True)])
    data = json.loads(oracle.to_str())
    if family == "llama-bpe":  # words that are tokens but that merges no longer reach
        data["model"]["ignore_merges"] = True
        del data["model"]["merges"][::7]
        data["post_processor"] = json.loads(processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 562)]).__getstate__())
    return json.dumps(data)


def family_pair(family):
    data = oracle_json(family)
    return Tokenizer.from_tokenizer_json(json.loads(data)), tokenizers.Tokenizer.from_str(data)


@lru_cache
def default_pair(model_path):
    """The real model's tokenizer, and `tokenizers` with the same vocabulary and merges."""
    metadata = GGUFFile(model_path).metadata
    vocabulary = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    oracle = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    oracle.pre_tokenizer = cut_of("smollm")
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([
        token for token, kind in zip(metadata["tokenizer.ggml.tokens"],
                                     metadata["tokenizer.ggml.token_type"]) if kind == 3])
    return Tokenizer.from_gguf(metadata), oracle


# ---- the same ids on every input -----------------------------------------------------------------

EVERY_CHARACTER = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
POOLS = [
    TEXT.split(),
    [apostrophe + ending for apostrophe in "'’"
     for ending in "s t re ve m ll d S T RE Ve M Ll D ſ".split()],
    [c for c in EVERY_CHARACTER if unicodedata.category(c)[0] == "N"],
    [*" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f",
     "\u3000", "\ufeff", "\r\n", "  ", "\n\n", " \n"],
    [c for c in EVERY_CHARACTER if unicodedata.category(c) in ("Cc", "Cf")],
    [c for c in EVERY_CHARACTER if unicodedata.category(c) in ("Mn", "Mc", "Me")],
    [c for c in EVERY_CHARACTER if c < "\u3000" and c.isalpha()],
    [c for c in EVERY_CHARACTER if c < "\u3100" and unicodedata.category(c)[0] in "PS"],
    ["👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇫🇷", "❤️", "1️⃣", "\U0001F3FB", "\u200d", "\ufe0f"],
    ["中", "각", "ᄀ", "ᅡ", "ᆨ"],
    ["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<|endoftext|>", "<|end|>", "<|begin|>",
     "<tool>", "<té>", "<te\u0301>", "<"],
    EVERY_CHARACTER,
]


def random_texts(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        pools = rng.sample(POOLS, rng.randint(1, 4))
        text = ""
        for _ in range(rng.randint(1, 12)):
            repeats = 1 if rng.random() < 0.9 else rng.randint(2, 40)
            text += rng.choice(rng.choice(pools)) * repeats + rng.choice(["", "", " "])
        yield text


def assert_same(ours, oracle, texts, normalize=str):
    """Ids, with special tokens and without, and the text that they decode to."""
    missing = {byte for byte in range(256) if ours._byte_ids[byte] is None}
    for allow_special in (False, True):
        oracle.encode_special_tokens = not allow_special
        expected = oracle.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, expected):
            ids = ours.encode(text, allow_special)
            assert ids == encoding.ids, ascii(text)
            known = bytes(byte for byte in normalize(text).encode() if byte not in missing)
            assert ours.decode(ids) == known.decode(errors="replace"), ascii(text)


def test_default_model_gives_the_ids_of_tokenizers(model_path):
    assert_same(*default_pair(model_path), list(random_texts(1, 21_000)))


@pytest.mark.parametrize("family", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_family_gives_the_ids_of_tokenizers(family):
    normalize = normalize_nfc if family == "qwen2" else str
    assert_same(*family_pair(family), list(random_texts(family, 5_000)), normalize)


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_every_character_is_a_letter_number_or_space_where_tokenizers_says_so(kind):
    text = "".join(EVERY_CHARACTER)
    others = pre_tokenizers.Split(tokenizers.Regex(kind), "removed").pre_tokenize_str(text)
    ours = regex.compile(f"[^[{kind}--[{NEWER_THAN_UNICODE_16}]]]", regex.VERSION1).findall(text)
    assert "".join(piece for piece, _ in others) == "".join(ours)


def test_every_number_stands_alone_where_tokenizers_says_so():
    text = "".join(f" {number}a" for number in POOLS[2])
    pieces = cut_of("smollm").pre_tokenize_str(text)
    assert Pretokenizer("smollm").words(text) == [text[start:end] for _, (start, end) in pieces]


def test_normalisation_is_that_of_tokenizers():
    oracle = normalizers.NFC()
    text = "".join(f"a{character}\u0301\u0323" for character in EVERY_CHARACTER)
    assert normalize_nfc(text) == oracle.normalize_str(text)
    marks = [*POOLS[5], "\u0344", "\u0f73", "\u0f75", "\u0f81", "\u3099"]
    rng = random.Random(5)
    for _ in range(2_000):
        text = "".join(rng.choice(marks) if rng.random() < 0.9 else rng.choice("aeé각ᄀ")
                       for _ in range(rng.choice([3, 10, 80, 200])))
        assert normalize_nfc(text) == oracle.normalize_str(text), ascii(text)


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 300_000, "ab" * 150_000, "\n " * 150_000,
                                  "é" * 100_000, "9" * 300_000, "!?" * 150_000],
                         ids=lambda text: ascii(text[:2]))
def test_a_long_input_is_no_trap(text, model_path):
    """Quadratic code would take hours here."""
    ours, oracle = default_pair(model_path)
    ids = ours.encode(text)
    assert ids == oracle.encode(text).ids
    assert ours.decode(ids) == text


def test_a_long_run_of_marks_is_no_trap():
    text = "a" + "\u0301\u0327\u0f73" * 100_000
    assert normalize_nfc(text) == normalizers.NFC().normalize_str(text)


# ---- the algorithm -------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=120),
       st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(4, 9)), max_size=30))
def test_the_fast_merge_equals_the_plain_one(ids, table):
    """Also for merge tables that no training makes: late ranks for early pairs, equal results."""
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(table)}
    merged = [result for _, _, result in table]
    assert bpe_encode_fast(ids, ranks, merged) == bpe_encode(ids, ranks, merged)


def test_merges_by_hand():
    """Rank decides, not position; equal ranks go from left to right."""
    ranks, merged = {(1, 2): 0, (0, 1): 1, (0, 0): 2}, [3, 4, 5]
    for merge in (bpe_encode, bpe_encode_fast):
        assert merge([0, 1, 2], ranks, merged) == [0, 3]
        assert merge([0, 0, 0], ranks, merged) == [5, 0]
        assert merge([], ranks, merged) == []


def trained_by_tokenizers(text, vocab_size, family, special_tokens=()):
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = cut_of(family)
    oracle.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return oracle


def spelled_merges(tokenizer):
    """Merges as `tokenizers` writes them, in its alphabet of visible characters."""
    alphabet = dict(zip(tokenizer._tokens[:256], sorted(pre_tokenizers.ByteLevel.alphabet())))
    return [["".join(alphabet[bytes([byte])] for byte in tokenizer.token_bytes(id))
             for id in pair] for pair in tokenizer._ranks]


@pytest.mark.parametrize("family", ["gpt-2", "smollm", "llama-bpe"])
def test_training_learns_the_merges_of_tokenizers(family):
    special_tokens = ["<|end|>", "<|begin|>"]
    ours = Tokenizer.train(TEXT, 520, family=family, special_tokens=special_tokens)
    oracle = trained_by_tokenizers(TEXT, 520, family, special_tokens)
    assert spelled_merges(ours) == json.loads(oracle.to_str())["model"]["merges"]
    assert ours.vocab_size == 520
    assert ours.special_tokens == {"<|end|>": 518, "<|begin|>": 519}  # there they are 0 and 1
    text = TEXT + "ungesehen: Straße"
    assert ours.encode(text) == [id - 2 for id in oracle.encode(text).ids]


@given(st.text("ab c", max_size=40))
@settings(max_examples=60, deadline=None)
def test_ties_are_broken_as_in_tokenizers(text):
    ours = Tokenizer.train(text, 300)
    oracle = trained_by_tokenizers(text, 300, "gpt-2")
    assert spelled_merges(ours) == json.loads(oracle.to_str())["model"]["merges"]
    assert ours.vocab_size == oracle.get_vocab_size()


def test_training_reads_any_iterable_and_stops_when_there_is_nothing_to_merge():
    assert bpe_train(Counter(), 300)[1] == []
    whole = Tokenizer.train("ab ab", 1000)
    parts = Tokenizer.train(iter(["ab", " ab"]), 1000)
    assert whole._tokens == parts._tokens
    assert whole._tokens[256:] == [b"ab", b" ab"]


@pytest.mark.parametrize("arguments, message", [
    (dict(vocab_size=256, special_tokens=["<|end|>"]), "vocab_size is 256, must be at least 256 f"),
    (dict(vocab_size=300, family="gpt-5"), "no pre-tokenizer 'gpt-5'; there are gpt-2, smollm"),
    (dict(vocab_size=300, special_tokens=["<a>", "<a>"]), "added token 299, '<a>', is spelled as"),
    (dict(vocab_size=300, special_tokens=[""]), "added token 299, '', is empty"),
])
def test_training_refuses(arguments, message):
    with pytest.raises(InputError, match=regex.escape(message)):
        Tokenizer.train("aaaabaaaacaaaadaaaaeaaaafaaaagaaaahaaaaiaaaaj" * 9 + TEXT, **arguments)


# ---- decoding ------------------------------------------------------------------------------------


def pieces_of(tokenizer, ids, skip_special):
    decoder = IncrementalDecoder(tokenizer, skip_special)
    return [*map(decoder.feed, ids), decoder.flush()]


def test_bytes_that_are_no_utf_8_decode_as_in_tokenizers():
    """Rust and Python must agree how many U+FFFD a broken sequence makes, streamed or not."""
    ours, oracle = family_pair("gpt-2")
    rng = random.Random(3)
    edges = bytes.fromhex("41 80 8F 90 9F A0 BF C0 C2 DF E0 E2 ED EF F0 F1 F4 F5 FF")
    for _ in range(4_000):
        data = [rng.choice(edges) if rng.random() < 0.8 else rng.randrange(256) for _ in range(8)]
        ids = [ours._byte_ids[byte] for byte in data]
        if rng.random() < 0.5:
            ids.insert(4, ours.special_tokens["<|end|>"])
        for skip_special in (False, True):
            text = ours.decode(ids, skip_special)
            assert text == oracle.decode(ids, skip_special_tokens=skip_special), data
            assert "".join(pieces_of(ours, ids, skip_special)) == text, data


def test_random_ids_decode_as_in_tokenizers(model_path):
    ours, oracle = default_pair(model_path)
    rng = random.Random(4)
    for _ in range(1_000):
        ids = [rng.randrange(rng.choice([20, ours.vocab_size])) for _ in range(12)]
        for skip_special in (False, True):
            text = ours.decode(ids, skip_special)
            assert text == oracle.decode(ids, skip_special_tokens=skip_special), ids
            assert "".join(pieces_of(ours, ids, skip_special)) == text, ids


def test_streaming_never_shows_half_a_character(model_path):
    ours, _ = default_pair(model_path)
    text = "naïve 日本語 👩‍👩‍👧 मैं 𝔘𝔫𝔦 end"
    pieces = pieces_of(ours, ours.encode(text), skip_special=True)
    assert len(pieces) > 20 and "" in pieces  # characters of several tokens do occur
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


def test_a_flushed_decoder_is_as_new():
    ours, _ = family_pair("gpt-2")
    half, letter = ours._byte_ids[0xC3], ours._byte_ids[0x41]
    decoder = IncrementalDecoder(ours)
    assert [decoder.feed(half), decoder.flush(), decoder.feed(letter), decoder.flush()] \
        == ["", "\ufffd", "A", ""]


@pytest.mark.parametrize("id", [-1, 49_152, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(id, model_path):
    ours, _ = default_pair(model_path)
    for use in (ours.token_bytes, IncrementalDecoder(ours).feed, lambda id: ours.decode([5, id])):
        with pytest.raises(InputError, match=f"token id {id} is not in the vocabulary, 0 to 49151"):
            use(id)


# ---- special and other added tokens --------------------------------------------------------------


def test_special_tokens_are_text_unless_allowed(model_path):
    ours, _ = default_pair(model_path)
    text = "Hi<|im_end|>\n<|im_start|>user"
    special = {ours.special_tokens["<|im_end|>"], ours.special_tokens["<|im_start|>"]}
    assert special == {1, 2}
    assert not special & set(ours.encode(text))
    assert ours.decode(ours.encode(text), skip_special=True) == text
    assert special < set(ours.encode(text, allow_special=True))
    assert ours.decode(ours.encode(text, allow_special=True)) == text
    assert ours.decode(ours.encode(text, allow_special=True), skip_special=True) == "Hi\nuser"
    assert ours.split_special(text) == ["Hi", 2, "\n", 1, "user"]
    assert ours.split_special("") == [] and ours.split_special("<|im_end|>") == [2]


def test_added_tokens_that_are_not_special_are_always_recognised():
    ours, _ = family_pair("gpt-2")
    tool, accented = ours.encode("<tool>"), ours.encode("<té>")
    assert tool == [563] and accented == [564]
    assert "<tool>" not in ours.special_tokens
    assert ours.decode([562, 563], skip_special=True) == "<tool>"
    assert ours.split_special("a<tool><|end|><|end|>") == ["a", 563, 561]  # the longest wins
    assert len(ours.encode("<|end|>")) > 1


def test_tokens_are_sought_before_or_after_normalisation_as_they_ask():
    ours, _ = family_pair("qwen2")
    assert ours.encode("<te\u0301>") == ours.encode("<t\u00e9>") == [564]
    assert ours.split_special("e\u0301<tool>") == ["\u00e9", 563]


def test_half_a_surrogate_pair_is_refused():
    ours, _ = family_pair("gpt-2")
    for text in ("a\ud83d", "\ude00", "<|end|>\ud83d"):
        with pytest.raises(InputError, match="half of a surrogate pair, which is no character"):
            ours.encode(text, allow_special=True)
    with pytest.raises(InputError, match="half of a surrogate pair"):
        Tokenizer.train("a\ud83d", 300)


# ---- files ---------------------------------------------------------------------------------------


def test_the_default_model(model_path):
    ours, _ = default_pair(model_path)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (49_152, 1, 2)
    assert ours.add_bos_token is False
    assert len(ours.special_tokens) == 17 and ours.special_tokens["<|endoftext|>"] == 0
    assert ours.encode("The capital of France is 123.") == [
        504, 3575, 282, 4649, 314, 216, 33, 34, 35, 30]


def test_tokenizer_json_as_a_file_with_its_config(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(oracle_json("gpt-2"))
    alone = Tokenizer.from_tokenizer_json(path)
    assert (alone.bos_token_id, alone.eos_token_id, alone.add_bos_token) == (None, None, False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": None, "eos_token": {"content": "<|end|>", "lstrip": False}}))
    ours = Tokenizer.from_tokenizer_json(str(path))
    assert (ours.bos_token_id, ours.eos_token_id) == (None, 560)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|nobody|>"}')
    with pytest.raises(InputError, match=r"json: bos_token in .* is '<\|nobody\|>'"):
        Tokenizer.from_tokenizer_json(path)


def test_a_template_that_adds_bos():
    ours, oracle = family_pair("llama-bpe")
    assert ours.add_bos_token and ours.bos_token_id == 562
    assert [ours.bos_token_id, *ours.encode("Hi there")] == oracle.encode("Hi there").ids
    data = json.loads(oracle_json("llama-bpe"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    data["post_processor"] = {"type": "Sequence", "processors": [byte_level,
                                                                 data["post_processor"]]}
    assert Tokenizer.from_tokenizer_json(data).bos_token_id == 562


def test_merges_may_be_strings_and_the_model_may_leave_out_its_type():
    data = json.loads(oracle_json("gpt-2"))
    expected = Tokenizer.from_tokenizer_json(data).encode(TEXT)
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    del data["model"]["type"], data["pre_tokenizer"]["use_regex"]
    assert Tokenizer.from_tokenizer_json(data).encode(TEXT) == expected


def edited(data, path, value):
    """A copy of nested dicts and lists with one value replaced, or removed if it is `...`."""
    data = copy.deepcopy(data)
    inner = data
    *parents, last = path
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize("path, value, message", [
    (["model"], ..., "model is None, must be of type dict"),
    (["model", "type"], "WordPiece", "model.type is 'WordPiece'; supported is only BPE"),
    (["model", "byte_fallback"], True, "model.byte_fallback is True"),
    (["model", "dropout"], 0.1, "model.dropout is 0.1"),
    (["model", "end_of_word_suffix"], "</w>", "model.end_of_word_suffix is '</w>'"),
    (["model", "continuing_subword_prefix"], "##", "model.continuing_subword_prefix is '##'"),
    (["model", "vocab"], ["a"], "model.vocab is ['a'], must be of type dict"),
    (["model", "vocab", "!"], "0", "model.vocab holds '0', must hold int only"),
    (["model", "vocab", "!"], 10**12, "token '!' has id 1000000000000; the 565 tokens must"),
    (["model", "vocab", "!"], -1, "token '!' has id -1; the 565 tokens must"),
    (["model", "vocab", "!"], 1, """token '"' has id 1, and so has b'!'"""),
    (["model", "vocab", "!"], ..., "token '<t\u00e9>' has id 564; the 564 tokens must"),
    (["model", "vocab", "a b"], 565, "token 'a b' holds ' ', which stands for no byte"),
    (["model", "merges"], {}, "model.merges is {}, must be of type list"),
    (["model", "merges", 3], "x nowhere", "merge 3 is 'x nowhere', must be two tokens"),
    (["model", "merges", 3], ["a", "b", "c"], "merge 3 is ['a', 'b', 'c'], must be two tokens"),
    (["model", "merges", 3], 7, "merge 3 is 7, must be two tokens"),
    (["model", "merges", 3], [["a"], {}], "merge 3 is [['a'], {}], must be two tokens"),
    (["model", "merges", 3], "! ~", "a merge makes b'!~', which is no token"),
    (["model", "ignore_merges"], "yes", "model.ignore_merges is 'yes', must be of type bool"),
    (["added_tokens"], "<a>", "added_tokens is '<a>', must be of type list"),
    (["added_tokens", 0], "<a>", "added_tokens holds '<a>', must hold dict only"),
    (["added_tokens", 0, "content"], 5, "content of an added token is 5, must be of type str"),
    (["added_tokens", 0, "content"], "", "added token 560, '', is empty"),
    (["added_tokens", 0, "content"], "\ud800", "half of a surrogate pair"),
    (["added_tokens", 0, "content"], "<tool>", "added token 563, '<tool>', is spelled as 560 is"),
    (["added_tokens", 0, "id"], 561, "token '<|end|><|end|>' has id 561, and so has b'<|end|>'"),
    (["added_tokens", 0, "id"], None, "id of added token '<|end|>' is None, must be of type int"),
    (["added_tokens", 0, "lstrip"], True, "added token '<|end|>' sets lstrip, which is not supp"),
    (["added_tokens", 0, "rstrip"], True, "added token '<|end|>' sets rstrip, which is not supp"),
    (["added_tokens", 0, "single_word"], True, "sets single_word, which is not supported"),
    (["normalizer"], {"type": "NFKC"}, "normalizer {'type': 'NFKC'} is not supported; only NFC"),
    (["normalizer"], "NFC", "normalizer is 'NFC', must be of type dict"),
    (["pre_tokenizer"], None, "pre_tokenizer None is not supported; supported are those of gpt-2"),
    (["pre_tokenizer"], {"type": "Whitespace"}, "pre_tokenizer {'type': 'Whitespace'} is not supp"),
    (["pre_tokenizer", "add_prefix_space"], True, "'add_prefix_space': True"),
    (["pre_tokenizer", "use_regex"], False, "'use_regex': False"),
    (["pre_tokenizer"], {"type": "Sequence"}, "pre_tokenizer.pretokenizers is None, must be of"),
    (["decoder"], {"type": "Metaspace"}, "decoder {'type': 'Metaspace'} is not supported"),
    (["post_processor"], {"type": "BertProcessing"}, "post_processor {'type': 'BertProcessing'}"),
    (["post_processor"], {"type": "TemplateProcessing", "single": [
        {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}]}, "only a TemplateProcess"),
    (["post_processor"], {"type": "TemplateProcessing", "special_tokens": {
        "<|end|>": {"ids": [9999]}}, "single": [{"SpecialToken": {"id": "<|end|>"}},
                                                {"Sequence": {"id": "A"}}]},
     "bos_token_id is 9999, must be from 0 to 564"),
])
def test_a_tokenizer_json_is_refused_by_name(path, value, message):
    data = edited(json.loads(oracle_json("gpt-2")), path, value)
    with pytest.raises(InputError, match=regex.escape(message)) as error:
        Tokenizer.from_tokenizer_json(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    (None, "cannot read .*: No such file"), (b"{", "is not JSON"), (b"\xff\xfe\x00", "is not JSON"),
    (b"[]", r"is \[\], must be of type dict"), (b"[" * 100_000, "is not JSON"),
    (b'{"model": 1' + b"0" * 5_000 + b"}", "is not JSON"),
])
def test_a_file_that_is_no_tokenizer_json_is_refused(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_tokenizer_json(path)
    assert "\n" not in str(error.value)


def test_an_unknown_token_for_missing_bytes_is_refused():
    data = json.loads(oracle_json("gpt-2"))
    vocabulary = data["model"]["vocab"]
    data["model"]["unk_token"] = "!"
    Tokenizer.from_tokenizer_json(data)  # all bytes have tokens: nothing is unknown
    vocabulary["~~~~"] = vocabulary.pop("\u00ff")
    with pytest.raises(InputError, match="model.unk_token is '!'; supported is only None"):
        Tokenizer.from_tokenizer_json(data)


def gguf_metadata(family):
    """What a converter would write into a GGUF file for a small tokenizer."""
    data = json.loads(oracle_json(family))
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    kinds = [1] * len(tokens)
    for token in data["added_tokens"]:
        tokens.append(token["content"])
        kinds.append(3 if token["special"] else 4)
    values = {"model": "gpt2", "pre": family, "tokens": tokens, "token_type": kinds,
              "merges": [" ".join(pair) for pair in data["model"]["merges"]],
              "bos_token_id": 562, "eos_token_id": 560}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("family", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_metadata_gives_the_tokenizer_of_tokenizer_json(family):
    ours, _ = family_pair(family)
    metadata = gguf_metadata(family)
    from_gguf = Tokenizer.from_gguf(metadata)
    for text in random_texts(9, 300):
        text = text.replace("\u0301", "")  # "<t\u00e9>" is sought before normalisation here
        assert from_gguf.encode(text, True) == ours.encode(text, True), ascii(text)
    assert from_gguf._tokens == ours._tokens and from_gguf.special_tokens == ours.special_tokens
    assert (from_gguf.bos_token_id, from_gguf.eos_token_id) == (562, 560)
    assert from_gguf.add_bos_token is (family == "llama-bpe")
    metadata["tokenizer.ggml.add_bos_token"] = family != "llama-bpe"
    assert Tokenizer.from_gguf(metadata).add_bos_token is (family != "llama-bpe")
    metadata["tokenizer.ggml.tokens"] += ["[PAD565]"]
    metadata["tokenizer.ggml.token_type"] += [5]
    assert Tokenizer.from_gguf(metadata).vocab_size == 566


@pytest.mark.parametrize("key, value, message", [
    ("model", ..., "the GGUF file has no tokenizer.ggml.model, without which"),
    ("model", "llama", "tokenizer.ggml.model is 'llama'; only 'gpt2', which"),
    ("model", 3, "tokenizer.ggml.model is 3, must be of type str"),
    ("pre", "default", "tokenizer.ggml.pre is 'default'; supported: gpt-2, smollm, llama-bpe, qw"),
    ("tokens", ["a", "a"], "tokenizer.ggml.tokens holds 'a' twice"),
    ("tokens", ["a", 5], "tokenizer.ggml.tokens holds 5, must hold str only"),
    ("tokens", ["a"], "tokenizer.ggml.tokens has 1 entries and token_type 565"),
    ("token_type", ..., "the GGUF file has no tokenizer.ggml.token_type"),
    ("token_type", [6] * 565, "token 0, '!', is of type 6; byte-level BPE has"),
    ("merges", ["a b", "ab"], "merge 1 is 'ab', must be two tokens of the vocabulary"),
    ("merges", "a b", "tokenizer.ggml.merges is 'a b', must be of type list"),
    ("bos_token_id", 565, "bos_token_id is 565, must be from 0 to 564"),
    ("eos_token_id", -1, "eos_token_id is -1, must be from 0 to 564"),
    ("eos_token_id", "2", "tokenizer.ggml.eos_token_id is '2', must be of type int"),
    ("bos_token_id", ..., "prompts must begin with a BOS token, but bos_token_id is not given"),
    ("add_eos_token", True, "tokenizer.ggml.add_eos_token is set"),
])
def test_gguf_metadata_is_refused_by_name(key, value, message):
    metadata = {**gguf_metadata("llama-bpe"), f"tokenizer.ggml.{key}": value}
    if value is ...:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(InputError, match=regex.escape(message)) as error:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(error.value)

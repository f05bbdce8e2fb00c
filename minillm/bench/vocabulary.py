"""What does a larger vocabulary buy, and what does it cost?

Tokenizers of growing size are trained on Shakespeare without Macbeth, and read Macbeth. Counted:
characters a token, on the play and on the text that they were trained on, beside the tokenizer of
the real model. Measured: the time to encode; a decode step of the real model whose head is cut
down to as many rows, in both twins, divided by the characters that a step then writes; and one
long word, encoded by the definition and by its fast form.
Chapter folder: chapters/02_tokenizer.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import numpy as np
from tqdm import tqdm

from ..bpe import bpe_encode, bpe_encode_fast, bpe_train
from ..linear import Dense
from ..loading import open_checkpoint
from ..loading.registry import fetch, resolve
from ..model_runner import make_runner
from ..pretokenizer import Pretokenizer
from ..tokenizer import Tokenizer
from . import draw, is_fast
from .machine import seconds
from .peers import in_process, measure_limits

MODEL = "smollm2-135m-instruct"
FAMILY = "smollm"  # text is cut into words as it is for the real model, so that sizes compare
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WORD_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BACKENDS = {"numpy": "NumPy fp32", "torch": "torch fp32"}
CONTEXT_LEN = 16


def measure():
    """The result, as JSON wants it."""
    sizes = SIZES[:2] if is_fast() else SIZES
    word_lengths = WORD_LENGTHS[:5] if is_fast() else WORD_LENGTHS
    rounds, steps_a_turn = (2, 1) if is_fast() else (5, 3)
    num_characters = 2**16 if is_fast() else None
    train_text, held_out = (fetch(name).read_text(encoding="utf-8")[:num_characters]
                            for name in ("shakespeare", "macbeth"))
    limits = in_process(measure_limits)

    words = Counter(Pretokenizer(FAMILY).words(train_text))
    trained = []
    training_s = seconds(lambda: trained.extend(bpe_train(words, max(sizes))))
    vocabularies = {size: shortened(*trained, size) for size in sizes}
    checkpoint = open_checkpoint(resolve(MODEL))
    real = checkpoint.tokenizer().vocab_size
    fresh = {size: lambda size=size: Tokenizer(*vocabularies[size], Pretokenizer(FAMILY))
             for size in sizes} | {real: checkpoint.tokenizer}
    return {
        "arguments": {"model": MODEL, "family": FAMILY, "rounds": rounds,
                      "steps_a_turn": steps_a_turn, "context_len": CONTEXT_LEN},
        "texts": {name: {"characters": len(text), "bytes": len(text.encode())}
                  for name, text in (("train", train_text), ("held_out", held_out))},
        "limits": limits,
        "training_s": training_s,
        "real_vocab_size": real,
        "counts": [{"vocab_size": size, "train_tokens": count_tokens(make(), words),
                    "held_out_tokens": len(make().encode(held_out))}
                   for size, make in tqdm(fresh.items(), desc="counting tokens")],
        "encode_samples": time_encoding(fresh, held_out, rounds),
        "word_samples": time_long_words(*vocabularies[max(sizes)], held_out, word_lengths, rounds),
        "step_samples": time_steps(checkpoint, fresh, rounds, steps_a_turn),
    }


def shortened(tokens, merges, size):
    """The vocabulary as training had it when there were `size` tokens.

    Training is greedy, so a smaller vocabulary is the beginning of a larger one: train once.
    """
    return tokens[:size], merges[: size - 256]


def count_tokens(tokenizer, words):
    """Of a text, from its words: a word has the same tokens wherever it stands."""
    return sum(count * len(tokenizer.encode(word)) for word, count in words.items())


def time_encoding(fresh, text, rounds):
    """Cold: no word has been seen before. Warm: all have. Cut: finding the words, and no BPE."""
    samples = []
    for number in tqdm(range(-1, rounds), desc="encoding"):
        for size, make in fresh.items():
            tokenizer = make()
            samples.append({"round": number, "vocab_size": size,
                            "cold_s": seconds(partial(tokenizer.encode, text)),
                            "warm_s": seconds(partial(tokenizer.encode, text)),
                            "cut_s": seconds(partial(tokenizer.pretokenizer.words, text))})
    return [sample for sample in samples if sample["round"] >= 0]  # round -1 is the warm-up


def time_long_words(tokens, merges, text, lengths, rounds):
    """The letters of a text, run together into one word: what a sentence of Chinese is like."""
    id_of = {token: id for id, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    merged = [id_of[tokens[left] + tokens[right]] for left, right in merges]
    letters = "".join(filter(str.isalpha, text)).lower()
    spelled = [id_of[bytes([byte])] for byte in letters.encode()]
    draws = random.Random(0)
    samples = []
    for number in tqdm(range(rounds), desc="long words"):
        start = draws.randrange(len(spelled) - max(lengths))
        for length in lengths:
            ids = spelled[start : start + length]
            bpe_encode_fast(ids, ranks, merged)  # warm-up
            samples.append({"round": number, "length": length, **{
                f"{function.__name__}_s": seconds(partial(function, ids, ranks, merged))
                for function in (bpe_encode, bpe_encode_fast)}})
    return samples


def time_steps(checkpoint, sizes, rounds, steps_a_turn):
    """Decode steps of the real model, with a head of the first `size` rows of its own."""
    runners = {name: make_runner(checkpoint, name, "cpu", "float32") for name in BACKENDS}
    caches = {name: runner.new_cache(CONTEXT_LEN + 1) for name, runner in runners.items()}
    context = list(range(CONTEXT_LEN))
    for name, runner in runners.items():
        runner.forward(context, context, caches[name], rows=[0])
    samples = []
    for number in tqdm(range(rounds), desc="decode steps"):
        for size in sizes:
            for name, runner in runners.items():
                embedding = runner.weights.embed_tokens.weight
                runner.weights.lm_head = Dense(embedding[:size])
                # The first step of a turn wakes the threads of its library, and is left out.
                steps_s = [seconds(partial(step, runner, caches[name]))
                           for _ in range(1 + steps_a_turn)][1:]
                samples.append({"round": number, "backend": name, "vocab_size": size,
                                "steps_s": steps_s})
    return samples


def step(runner, cache):
    runner.forward([0], [CONTEXT_LEN], cache, rows=[0])
    cache.truncate(CONTEXT_LEN)


def rows_of(result):
    """One row a vocabulary, the real model's last: counts, medians, limits."""
    texts, limits = result["texts"], result["limits"]
    megabytes = texts["held_out"]["bytes"] / 1e6
    hidden_size = limits["head_params"] // result["real_vocab_size"]
    rows = []
    for count in result["counts"]:
        size = count["vocab_size"]
        encodings = [each for each in result["encode_samples"] if each["vocab_size"] == size]
        held_out = texts["held_out"]["characters"] / count["held_out_tokens"]
        params = limits["layer_params"] + size * hidden_size
        row = {
            "vocab_size": size, "held_out": held_out,
            "train": texts["train"]["characters"] / count["train_tokens"],
            "head_share": size * hidden_size / params,
            "weights": params / held_out,  # read to write one character
            "limit_ms": 1e3 * 4 * params / limits["read_bytes_per_s"] / held_out,
        }
        for kind in ("cold", "warm", "cut"):
            row[kind] = [1e3 * each[f"{kind}_s"] / megabytes for each in encodings]
        for name in BACKENDS:
            row[name] = [1e3 * each_s / held_out for sample in result["step_samples"]
                         if (sample["backend"], sample["vocab_size"]) == (name, size)
                         for each_s in sample["steps_s"]]
        rows.append(row)
    return rows


def figure(result):
    """Characters a token, time to encode, one long word, and time a written character."""
    picture, ((compression, step_time), (encoding, word)) = draw.new_figure(2, 2, height=5.4)
    rows = rows_of(result)
    draw_compression(compression, rows)
    draw_step_time(step_time, rows)
    draw_encoding(encoding, rows)
    draw_word(word, result["word_samples"])
    for axis in (compression, step_time, encoding):
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["vocab_size"] for row in rows[:-1]],
                        [thousands(row["vocab_size"]) for row in rows[:-1]])
        axis.minorticks_off()
        axis.set_xlabel("vocabulary size, tokens")
        axis.set_ylim(bottom=0)
    return picture


def draw_compression(axis, rows):
    *trained, real = rows
    sizes = [row["vocab_size"] for row in trained]
    axis.plot(sizes, [row["train"] for row in trained], "o--", color=draw.SKY, markersize=4,
              label="the text it was trained on")
    axis.plot(sizes, [row["held_out"] for row in trained], "o-", color=draw.BLUE, markersize=4,
              label="Macbeth, held out")
    axis.axhline(real["held_out"], color=draw.GREY, linestyle=":")
    axis.plot(real["vocab_size"], real["held_out"], "*", color=draw.RED, markersize=9,
              label=f"Macbeth, the real model's {real['vocab_size']:,}")
    axis.set_ylabel("characters a token")
    axis.set_title("what a larger vocabulary buys")
    axis.legend(frameon=False, loc="lower right")


def draw_step_time(axis, rows):
    sizes = [row["vocab_size"] for row in rows]
    for (name, label), colour, width in zip(BACKENDS.items(), (draw.ORANGE, draw.BLUE), (4, 1.5)):
        plot_medians(axis, sizes, [row[name] for row in rows], colour, label, width)
    axis.plot(sizes, [row["limit_ms"] for row in rows], color=draw.GREEN, linewidth=2,
              label="limit: bytes of weights ÷ bandwidth")
    axis.set_ylabel("ms a character")
    axis.set_title("decoding: time of a step ÷ characters a token")
    # One step that the system interrupted must not flatten the curves; the table has the spread.
    axis.set_ylim(top=1.5 * max(np.median(row[name]) for row in rows for name in BACKENDS))
    for name in BACKENDS:
        axis.plot(sizes[-1], np.median(rows[-1][name]), "*", color=draw.RED, markersize=9)
    axis.legend(frameon=False)


def draw_encoding(axis, rows):
    sizes = [row["vocab_size"] for row in rows]
    for kind, colour, label in (("cold", draw.BLUE, "every word new"),
                                ("warm", draw.SKY, "every word seen before"),
                                ("cut", draw.GREEN, "only cutting into words")):
        plot_medians(axis, sizes, [row[kind] for row in rows], colour, label)
    axis.set_ylabel("ms a megabyte of text")
    axis.set_title("encoding Macbeth")
    axis.set_ylim(top=1.4 * max(max(row["cold"]) for row in rows))  # room for the legend
    axis.legend(frameon=False, loc="upper left")


def draw_word(axis, samples):
    lengths = sorted({sample["length"] for sample in samples})
    times = {name: [[1e3 * sample[f"{name}_s"] for sample in samples
                     if sample["length"] == length] for length in lengths]
             for name in ("bpe_encode", "bpe_encode_fast")}
    for (name, times_ms), colour in zip(times.items(), (draw.RED, draw.BLUE)):
        plot_medians(axis, lengths, times_ms, colour, name)
    last = np.median(times["bpe_encode"][-1])
    axis.plot(lengths, [last * (length / lengths[-1]) ** 2 for length in lengths], ":",
              color=draw.GREY, label="∝ length²")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [thousands(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("letters of one word")
    axis.set_ylabel("ms")
    axis.set_title("one long word")
    axis.legend(frameon=False)


def plot_medians(axis, x, samples, colour, label, width=1.5):
    """A line through the medians, and every sample as a dot."""
    axis.plot(x, [np.median(each) for each in samples], color=colour, label=label, linewidth=width)
    for place, each in zip(x, samples):
        axis.plot([place] * len(each), each, ".", color=colour, markersize=3)


def thousands(number):
    return f"{number // 1024}K" if number >= 1024 else str(number)


def table(result):
    """Markdown; the times are medians."""
    lines = ["| tokens | characters a token, Macbeth | the training text | head, of all weights "
             "| weights read a character | ms a character, NumPy | torch "
             "| encoding cold, ms/MB | warm |", "| --- " * 9 + "|"]
    for row in rows_of(result):
        name = f"{row['vocab_size']:,}"
        if row["vocab_size"] == result["real_vocab_size"]:
            name = f"{name} (the real model's)"
        times = [f"{np.median(row[key]):.1f} ({min(row[key]):.1f}–{max(row[key]):.1f})"
                 for key in BACKENDS]
        times += [f"{np.median(row[key]):.0f}" for key in ("cold", "warm")]
        lines.append(f"| {name} | {row['held_out']:.2f} | {row['train']:.2f} "
                     f"| {row['head_share']:.1%} | {row['weights'] / 1e6:.1f} M "
                     f"| {' | '.join(times)} |")
    longest = max(sample["length"] for sample in result["word_samples"])
    slow, fast = (1e3 * np.median([sample[f"{name}_s"] for sample in result["word_samples"]
                                   if sample["length"] == longest])
                  for name in ("bpe_encode", "bpe_encode_fast"))
    cut = np.median([each for row in rows_of(result) for each in row["cut"]])
    machine, texts = result["machine"], result["texts"]
    return "\n".join(lines) + (
        f"\n\nCutting into words alone: {cut:.0f} ms/MB. One word of {longest:,} letters: "
        f"`bpe_encode` {slow:.0f} ms, `bpe_encode_fast` {fast:.1f} ms. Training all of them: "
        f"{result['training_s']:.1f} s for {texts['train']['characters'] / 1e6:.1f} M characters. "
        f"{machine['cores']} cores of {machine['cpu']}, "
        f"{result['limits']['read_bytes_per_s'] / 1e9:.0f} GB/s; "
        f"torch {machine['versions']['torch']}; "
        f"{result['arguments']['rounds']} interleaved rounds, median (lowest–highest); "
        f"{machine['date']}.")

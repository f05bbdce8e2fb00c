"""Words as strings of characters, one a token, so that joining is str.replace."""

from __future__ import annotations

from collections import Counter

from minillm.bpe import BYTES_IN_ORDER


def bpe_train(words, num_tokens):
    tokens = [bytes([byte]) for byte in BYTES_IN_ORDER]
    id_of_byte = {byte: id for id, byte in enumerate(BYTES_IN_ORDER)}
    spelled = ["".join(chr(id_of_byte[byte]) for byte in word.encode()) for word in words]
    merges = []
    for new_id in range(256, num_tokens):
        counts = Counter()
        for word, occurrences in zip(spelled, words.values()):
            for i in range(len(word) - 1):
                counts[word[i : i + 2]] += occurrences
        if not counts:
            break
        best, _ = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[0]
        left, right = map(ord, best)
        merges.append((left, right))
        tokens.append(tokens[left] + tokens[right])
        spelled = [word.replace(best, chr(new_id)) for word in spelled]
    return tokens, merges

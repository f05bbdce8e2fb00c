"""Grader of chapter 09_paged_cache. README.md in this folder tells how graders are written."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np

from minillm.block_manager import BlockManager
from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import as_array, check, close, equal, peak_bytes, raises, require
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np
from minillm.paged_cache import PagedCache
from minillm.request import Request
from minillm.sampling_params import SamplingParams
from minillm.scheduler import Scheduler
from minillm.sequence import Sequence

# Pairwise different, so that no mixed-up axis passes.
NUM_BLOCKS, BLOCK_SIZE, K, D = 7, 3, 2, 4
L, H = 3, 6
CONFIG = ModelConfig(vocab_size=13, hidden_size=10, intermediate_size=8, num_hidden_layers=L,
                     num_attention_heads=H, num_key_value_heads=K, head_dim=D)


# ── BlockTable ───────────────────────────────────────────────────────────────────────────────


def table_of(BlockTable, block_size, block_ids):
    table = BlockTable(block_size)
    blocks = as_list(table.block_ids, "an empty list, block_ids",
                     "set it in __init__: self.block_ids = []")
    blocks.extend(block_ids)
    return table


def as_list(value, expected, hint=None):
    require(isinstance(value, list), expected, f"a {type(value).__name__}", hint)
    return value


def loop_slots(block_size, block_ids, start, end):
    """Walk through all positions from 0, block by block, and note the slots that are asked for."""
    slots, position = [], 0
    for block_id in block_ids:
        for offset in range(block_size):
            if start <= position < end:
                slots.append(block_id * block_size + offset)
            position += 1
    return slots


def slot_mistakes(block_size, block_ids, start, end):
    """What the usual mistakes would return."""
    positions = range(start, end)

    def slots(slot):
        try:
            return [slot(position) for position in positions]
        except IndexError:
            return None

    return {
        "the end is included: the positions go up to end − 1":
            loop_slots(block_size, block_ids, start, end + 1),
        "those are ids of blocks: a slot is block id · block_size + offset":
            slots(lambda p: block_ids[p // block_size]),
        "those are positions: the block's own id is not used":
            list(positions),
        "those are offsets within the blocks: add block id · block_size":
            [p % block_size for p in positions],
        "the slots begin with the first block, whatever `start` is":
            loop_slots(block_size, block_ids, 0, end - start),
        "the tokens go round the blocks in turns: a block holds block_size tokens in a row": slots(
            lambda p: block_ids[p % len(block_ids)] * block_size + p // len(block_ids)),
        "the offset is not added: every token of a block gets the slot of its first":
            slots(lambda p: block_ids[p // block_size] * block_size),
    }


@check("a new table has no blocks, and no two tables share theirs")
def empty(BlockTable):
    first, second = BlockTable(4), BlockTable(5)
    equal([first.block_size, second.block_size], [4, 5], hint="self.block_size = block_size")
    equal(first.block_ids, [], hint="a new table holds nothing: self.block_ids = []")
    as_list(first.block_ids, "an empty list").append(3)
    equal(second.block_ids, [], hint=(
        "two tables share one list: make it in __init__, not in the class and not as a default "
        "argument"))


@check("it counts the blocks that are missing")
def missing(BlockTable):
    table = BlockTable(4)
    got = [table.num_missing_blocks(num_tokens) for num_tokens in (0, 1, 3, 4, 5, 8, 9)]
    equal(got, [0, 1, 1, 1, 2, 2, 3], mistakes={
        "rounded down: a block that is begun is needed as well": [0, 0, 0, 1, 1, 2, 2],
        "a full block needs no other behind it: 4 tokens fit in one block of 4":
            [1, 1, 1, 2, 2, 3, 3],
        "counts tokens, not blocks": [0, 1, 3, 4, 5, 8, 9],
    }, hint="for 0, 1, 3, 4, 5, 8 and 9 tokens in blocks of 4")


@check("blocks that are there are not missing")
def enough(BlockTable):
    table = table_of(BlockTable, 4, [9, 0])
    got = [table.num_missing_blocks(num_tokens) for num_tokens in (0, 1, 4, 8, 9, 12, 13)]
    equal(got, [0, 0, 0, 0, 1, 1, 2], mistakes={
        "a sequence that has more blocks than it needs misses none, not a negative number":
            [-2, -1, -1, 0, 1, 1, 2],
        "the blocks that the table holds already are not subtracted": [0, 1, 1, 2, 3, 3, 4],
    }, hint="for 0, 1, 4, 8, 9, 12 and 13 tokens, where there are two blocks of 4")


@check("slots within one block")
def one_block(BlockTable):
    table = table_of(BlockTable, 4, [2])
    equal(table.slot_mapping(0, 4), [8, 9, 10, 11], mistakes=slot_mistakes(4, [2], 0, 4))
    equal(table.slot_mapping(1, 3), [9, 10], mistakes=slot_mistakes(4, [2], 1, 3))


@check("a sequence goes on in whatever block comes next")
def several_blocks(BlockTable):
    blocks = [7, 2, 0]
    for start, end in ((2, 6), (0, 12), (5, 5), (11, 12), (4, 9)):
        table = table_of(BlockTable, 4, blocks)
        equal(table.slot_mapping(start, end), loop_slots(4, blocks, start, end),
              mistakes=slot_mistakes(4, blocks, start, end),
              hint=f"positions {start} to {end - 1} in the blocks {blocks} of 4 tokens")


@check("blocks that are added or exchanged later are used")
def changed(BlockTable):
    table = table_of(BlockTable, 3, [5])
    equal(table.slot_mapping(1, 3), [16, 17], mistakes=slot_mistakes(3, [5], 1, 3))
    table.block_ids.append(1)
    equal(table.slot_mapping(1, 5), [16, 17, 3, 4],
          hint="a block was appended to block_ids: read the list at each call")
    table.block_ids[0] = 6  # as after a copy on write
    equal(table.slot_mapping(1, 5), [19, 20, 3, 4],
          hint="a block was exchanged for another, as copy on write does: keep no old slots")


@check("blocks and lengths of any size")
def any_size(BlockTable):
    rng = np.random.default_rng(3)
    for _ in range(40):
        block_size, num_blocks = map(int, rng.integers(1, 6, size=2))
        blocks = rng.permutation(50)[:num_blocks].tolist()
        start, end = sorted(rng.integers(0, block_size * num_blocks + 1, size=2).tolist())
        table = table_of(BlockTable, block_size, blocks)
        equal(table.slot_mapping(start, end), loop_slots(block_size, blocks, start, end),
              mistakes=slot_mistakes(block_size, blocks, start, end),
              hint=f"positions {start} to {end - 1} in the blocks {blocks} of {block_size}")


@check("a position without a block is refused", hint=(
    "a ValueError is asked for: Python's own IndexError says nothing, and negative or wrapped "
    "indices write one sequence's key over another's"))
def refused(BlockTable):
    silent = "some slot is named for a position that has no block: its key would be written " \
             "over another's"
    table = table_of(BlockTable, 4, [7, 2])
    for start, end in ((8, 9), (0, 9), (7, 10), (12, 13)):
        raises(ValueError, table.slot_mapping, start, end, hint=silent)
    raises(ValueError, BlockTable(4).slot_mapping, 0, 1, hint=silent)
    equal(table.slot_mapping(7, 8), [11],
          hint="position 7 has a place, the last in the second block of 4")


# ── paged_gather_np ──────────────────────────────────────────────────────────────────────────


def pages_of(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, K=K, D=D, dtype=np.float64):
    """Every row is another; they say where they stand: block, offset, head, entry."""
    shape = num_blocks, block_size, K, D
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


def loop_gather(pages, block_tables):
    """Row by row."""
    _, block_size, K, D = pages.shape
    tables = np.asarray(block_tables).reshape(-1, np.shape(block_tables)[-1])
    out = np.zeros((len(tables), tables.shape[1] * block_size, K, D), pages.dtype)
    for b, table in enumerate(tables):
        for w, block_id in enumerate(table):
            for offset in range(block_size):
                out[b, w * block_size + offset] = pages[block_id, offset]
    return out.reshape(*np.shape(block_tables)[:-1], *out.shape[1:])


def gather_mistakes(pages, tables):
    """What the usual mistakes would return."""
    right = loop_gather(pages, tables)
    taken = pages[np.asarray(tables)]  # [..., W, block_size, K, D]
    mixed = np.swapaxes(taken, -4, -3).reshape(right.shape)
    mistakes = {
        "blocks and offsets are exchanged: all first tokens of the blocks come first": mixed,
        "the blocks come in the order of the memory, not of the table":
            loop_gather(pages, np.sort(tables, axis=-1)),
    }
    if np.ndim(tables) > 1:
        first = right.reshape(-1, *right.shape[-3:])[0]
        mistakes["every sequence gets the first one's blocks"] = np.broadcast_to(first, right.shape)
    return mistakes


def gathers(paged_gather_np, pages, tables, hint=None):
    expected = loop_gather(pages, tables)
    got = as_array(paged_gather_np(pages, tables), f"an array of shape {expected.shape}")
    shapes = {
        (*np.shape(tables), *pages.shape[1:]):
            "blocks and offsets are two axes still: join them to one, W·block_size tokens",
        np.shape(tables) + pages.shape[2:]:
            "one row came for each block: a block has block_size of them",
        (math.prod(np.shape(tables)) * pages.shape[1], *pages.shape[2:]):
            "all sequences came behind one another: keep the first axes of block_tables",
    }
    require(got.shape == expected.shape, f"shape [..., W·block_size, K, D] = {expected.shape}",
            f"shape {got.shape}", shapes.get(got.shape))
    close(got, expected, mistakes=gather_mistakes(pages, tables), hint=hint)


@check("one sequence, from one block")
def gather_one(paged_gather_np):
    gathers(paged_gather_np, pages_of(), np.array([4]), hint="the rows of block 4, in their order")


@check("the tokens of a sequence come in order, wherever its blocks lie")
def gather_order(paged_gather_np):
    gathers(paged_gather_np, pages_of(), np.array([5, 0, 3, 1]),
            hint="the table says the order of the blocks; block 0 is a block like any other")


@check("many sequences at once")
def gather_many(paged_gather_np):
    tables = np.array([[5, 0], [2, 6], [3, 3], [1, 4], [0, 0]])
    gathers(paged_gather_np, pages_of(), tables,
            hint="row b belongs to table b; a shared or repeated block is read for each")


@check("any number of axes before the last", hint=(
    "block_tables is [..., W]: take the leading axes as they come, `*batch, W = tables.shape`"))
def gather_axes(paged_gather_np):
    tables = np.random.default_rng(0).integers(0, NUM_BLOCKS, size=(2, 5, 4))
    gathers(paged_gather_np, pages_of(), tables)


@check("blocks of one token, heads of one number, one block in all")
def gather_ones(paged_gather_np):
    gathers(paged_gather_np, pages_of(block_size=1), np.array([[3, 1], [0, 2]]))
    gathers(paged_gather_np, pages_of(K=1, D=1), np.array([[3, 1], [0, 2]]),
            hint="int8 caches keep their scales in pages with D = 1")
    gathers(paged_gather_np, pages_of(num_blocks=1), np.array([[0], [0]]))


@check("numbers keep their dtype")
def gather_dtype(paged_gather_np):
    for dtype in (np.float32, np.int8):
        got = paged_gather_np(pages_of(dtype=dtype), np.array([1, 0]))
        equal(str(np.asarray(got).dtype), np.dtype(dtype).name, hint=(
            "np.zeros(shape) is float64 if nothing else is said: pass pages.dtype"))


@check("the answer is a copy")
def gather_copy(paged_gather_np):
    pages = pages_of()
    before = pages.copy()
    got = paged_gather_np(pages, np.array([2, 3]))
    np.asarray(got)[:] = -1
    require(np.array_equal(pages, before), "the cache as it was, when the answer is written to",
            "other numbers in it", "a view of the pages was returned: somebody who works on the "
            "gathered keys would change the cache")


@check("only the blocks of the tables are copied", twin=False)  # NumPy's memory
def gather_memory(paged_gather_np):
    pages, tables = np.zeros((4000, BLOCK_SIZE, K, D)), np.array([[17, 5], [9, 3000]])
    peak, wanted = peak_bytes(paged_gather_np, pages, tables), 4 * BLOCK_SIZE * K * D * 8
    require(peak < pages.nbytes / 4, f"about {wanted:,} bytes for four blocks, far less than the "
            f"{pages.nbytes:,} of all pages", f"{peak:,} bytes at the peak",
            "the whole memory is copied to read a few blocks: index `pages` with the tables")


# ── match_prefix ─────────────────────────────────────────────────────────────────────────────


def loop_hash(parent_hash, token_ids):
    """The package's name for a block, computed by hand: eight bytes a token."""
    return hashlib.sha256(parent_hash + b"".join(struct.pack("=q", token) for token in token_ids)
                          ).digest()


def chain(token_ids, block_size, first_id=10):
    """{hash: id} of all full blocks of one sequence; ids first_id, first_id + 3, ..."""
    parent, cached = b"", {}
    for index in range(len(token_ids) // block_size):
        parent = loop_hash(parent, token_ids[index * block_size : (index + 1) * block_size])
        cached[parent] = first_id + 3 * index
    return cached


def loop_match(token_ids, block_size, cached_blocks):
    """Whether each block is there, from the first to the one before the last token's."""
    found, parent, position = [], b"", 0
    while position + block_size < len(token_ids):
        parent = loop_hash(parent, token_ids[position : position + block_size])
        if parent not in cached_blocks:
            return found
        found.append(cached_blocks[parent])
        position += block_size
    return found


def match(match_prefix, token_ids, block_size, cached, hint=None, mistakes=None):
    got = match_prefix(token_ids, block_size, cached)
    if isinstance(got, (list, tuple)) and any(isinstance(each, bytes) for each in got):
        require(False, "ids of blocks", "hashes", "look the id up: cached_blocks[hash]")
    equal(got, loop_match(token_ids, block_size, cached), hint=hint, mistakes={
        "the last token's block is taken too: its logits are still wanted, so it has to be "
        "computed": loop_match([*token_ids, 0], block_size, cached),
        "one block is missing at the end: a full block counts as soon as a token stands behind it":
            loop_match(token_ids, block_size, cached)[:-1],
        **(mistakes or {})})


@check("nothing is cached, nothing is found")
def match_nothing(match_prefix):
    for token_ids in ([4, 5, 6, 7, 8], [4], [4, 5]):
        match(match_prefix, token_ids, 2, {}, hint="an empty list")


@check("the first block is found by its hash")
def match_first(match_prefix):
    cached = chain([1, 2], 2)
    match(match_prefix, [1, 2, 3], 2, cached, hint="the parent of the first block is ROOT_HASH")
    match(match_prefix, [2, 1, 3], 2, cached, hint="other tokens, so another block")
    match(match_prefix, [1, 3, 2], 2, cached, hint="one token differs, so nothing is shared")


@check("each block's hash goes on from the one before")
def match_chain(match_prefix):
    token_ids = [3, 1, 4, 1, 5, 9, 2, 6]
    for block_size in (1, 2, 3):
        cached = chain(token_ids, block_size)
        first = list(cached.values())[:1]
        match(match_prefix, [*token_ids, 5, 3], block_size, cached, mistakes={
            "only the first block is found: the hash of a block becomes the parent of the next":
                first})


@check("the last token's block is never taken")
def match_last(match_prefix):
    token_ids = [3, 1, 4, 1, 5, 9]
    for length in (6, 5, 4, 3, 2, 1):
        match(match_prefix, token_ids[:length], 2, chain(token_ids, 2),
              hint=f"of {length} tokens, the last is to be computed again, with its block")


@check("a block that is not full is not looked up")
def match_partial(match_prefix):
    token_ids = [3, 1, 4, 1, 5]
    cached = chain(token_ids, 3) | {loop_hash(loop_hash(b"", [3, 1, 4]), [1, 5]): 99,
                                    loop_hash(loop_hash(b"", [3, 1, 4]), [1]): 98}
    match(match_prefix, token_ids, 3, cached, hint="only blocks of block_size tokens have names",
          mistakes={"the rest of the tokens is hashed as if it were a full block": [10, 99]})


@check("the run ends where the first block is missing")
def match_gap(match_prefix):
    token_ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    whole = chain(token_ids, 2)
    for gone in range(4):
        cached = {name: block for index, (name, block) in enumerate(whole.items()) if index != gone}
        beyond = [block for index, block in enumerate(whole.values()) if index != gone]
        match(match_prefix, token_ids, 2, cached, mistakes={
            "the run goes on behind a missing block: the tokens in the gap would have no keys":
                beyond}, hint=f"block number {gone} is missing, so what follows is of no use")


@check("the same tokens in another place are another block")
def match_place(match_prefix):
    cached = chain([7, 7, 1, 2, 3, 4], 2)  # 1, 2 stands behind 7, 7 there
    match(match_prefix, [1, 2, 3, 4, 5], 2, cached, mistakes={
        "a block is found by its tokens alone": [13, 16]},
        hint="no sequence that begins with 1, 2 was computed")
    alone = {loop_hash(b"", [token, token]): token for token in range(9)}
    match(match_prefix, [1, 1, 2, 2, 3], 2, alone, mistakes={
        "the parent's hash is left out: a key depends on all tokens before it, so equal tokens "
        "behind other ones are another block": [1, 2]})


@check("sequences that part find what they have in common")
def match_common(match_prefix):
    rng = np.random.default_rng(5)
    for _ in range(30):
        block_size = int(rng.integers(1, 5))
        known = rng.integers(0, 2, size=20).tolist()
        asked = rng.integers(0, 2, size=rng.integers(1, 20)).tolist()
        asked[: len(asked) // 2] = known[: len(asked) // 2]
        match(match_prefix, asked, block_size, chain(known, block_size) | chain(
            known[::-1], block_size, first_id=200))


# ── In the engine ────────────────────────────────────────────────────────────────────────────
# Each with the checks' own loops in the place of the other two, which are graded for themselves.


class LoopTable:
    def __init__(self, block_size):
        self.block_size, self.block_ids = block_size, []

    def num_missing_blocks(self, num_tokens):
        return max(0, math.ceil(num_tokens / self.block_size) - len(self.block_ids))

    def slot_mapping(self, start, end):
        return loop_slots(self.block_size, self.block_ids, start, end)


LOOPS = {"BlockTable": LoopTable, "paged_gather_np": loop_gather, "match_prefix": loop_match}


@check("the engine keeps sequences of several lengths apart with it")
def table_in_the_engine(BlockTable):
    table = table_of(BlockTable, BLOCK_SIZE, [1])
    equal([table.num_missing_blocks(4), *table.slot_mapping(0, 3)], [1, 3, 4, 5])
    # What follows takes the class itself, since the engine sets block_ids anew.
    serve({"BlockTable": BlockTable.thing},
          "the engine's answers change: the checks above say why; note that the engine replaces "
          "block_ids by a new list")


@check("the engine reads the keys of several sequences with it")
def gather_in_the_engine(paged_gather_np):
    serve({"paged_gather_np": paged_gather_np}, "the engine's answers change: the checks above say "
                                                "why")


@check("requests that begin alike share blocks, and their answers do not change")
def match_in_the_engine(match_prefix):
    num_blocks, num_cached_tokens = serve(
        {"match_prefix": match_prefix},
        "the engine's answers change: keys of other tokens were taken for a sequence's own")
    # PROMPTS[1] shares two blocks with [0], [2] one, [3] none. [4] is [1] again, whose third block
    # is full, but holds the last token.
    equal(num_cached_tokens, [0, 6, 3, 0, 6],
          hint="prompt tokens that each of five requests found in the cache")
    expected_blocks, _ = serve({}, "the grader is at fault, not you: please report it")
    equal(num_blocks, expected_blocks, hint="blocks that five prompts take together")


PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [3, 1, 4, 1, 5, 9, 7, 8, 9], [3, 1, 4, 9, 9, 9, 9],
           [1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5, 9, 7, 8, 9])


def serve(students, hint):
    """Five requests and six tokens of answer to each through scheduler, paged cache and a random
    model; every logit must be that of the whole text alone.

    -> blocks referenced after all prompts are computed, [prompt tokens each found in the cache]
    """
    weights = random_weights(np.random.default_rng(7))
    with using(**LOOPS | students):
        blocks = BlockManager(40, BLOCK_SIZE)
        cache = PagedCache(CONFIG, 40, BLOCK_SIZE, np.float64)
        scheduler = Scheduler(blocks, max_num_seqs=8, max_num_batched_tokens=9)
        sequences = []
        for number, prompt in enumerate(PROMPTS):
            request = Request(prompt, SamplingParams(), ())
            sequences.append(Sequence(request, request.output.outputs[0], number, BLOCK_SIZE))
            scheduler.add(sequences[-1])
        num_blocks, logits = None, {sequence.order: [] for sequence in sequences}
        while scheduler.running or scheduler.waiting:
            batch = scheduler.schedule()
            if num_blocks is None and not scheduler.waiting:
                num_blocks = 40 - blocks.num_available_blocks
            rows = forward_np(weights, np.array(batch.tokens), np.array(batch.positions),
                              cache.step(batch.spans), batch.rows)
            scheduler.update(batch)
            for sequence, row in zip(batch.sampling, rows):
                logits[sequence.order].append(row)
                sequence.token_ids.append(int(row.argmax()))
                if len(logits[sequence.order]) == 6:
                    scheduler.remove(sequence)
    for sequence, prompt in zip(sequences, PROMPTS):
        token_ids = np.array(sequence.token_ids[:-1])
        expected = forward_np(weights, token_ids, np.arange(len(token_ids)), WholeText())
        close(np.stack(logits[sequence.order]), expected[len(prompt) - 1 :], hint=hint)
    return num_blocks, [sequence.num_cached_tokens for sequence in sequences]


class WholeText:
    """Keeps nothing: the whole text is in every pass. Attention as plain loops."""

    def attend(self, layer, q, k, v):
        out = np.zeros(q.shape)
        for n in range(len(q)):
            for h in range(H):
                keys, values = k[: n + 1, h // (H // K)], v[: n + 1, h // (H // K)]
                scores = [float(q[n, h] @ key) / math.sqrt(D) for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                for weight, value in zip(weights, values):
                    out[n, h] += weight / sum(weights) * value
        return out


def random_weights(rng):
    C, F = CONFIG.hidden_size, CONFIG.intermediate_size

    def dense(*shape):
        return Dense(rng.normal(size=shape) / math.sqrt(shape[1]))

    def norm():
        return rng.normal(1, 0.2, size=C)

    layers = [LayerWeights(norm(), dense((H + 2 * K) * D, C), dense(C, H * D), norm(),
                           dense(F, C), dense(F, C), dense(C, F)) for _ in range(L)]
    return Weights(CONFIG, dense(CONFIG.vocab_size, C), layers, norm(),
                   dense(CONFIG.vocab_size, C), 10000.0 ** (-np.arange(0, D, 2) / D))

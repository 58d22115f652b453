"""A pool whose layers with a sliding window have blocks of their own: whose they are, how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.runtime.block_group import BlockGroup
from specdec.runtime.kv_layout import BlockBytes, SlidingLayers, divide
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.kv_slots import BLOCK_TOKENS, GONE, KvAllocation
from specdec.runtime.packed_model import GivingBack, PackedModel
from specdec.runtime.prefix_cache import PrefixKeys
from tests.unit.test_decoder import tiny_model

WINDOW = 100
SLIDING = SlidingLayers(frozenset({0, 2}), WINDOW, pass_tokens=BLOCK_TOKENS, session_tokens=8 * BLOCK_TOKENS)
SHAPES = {0: KvShape(2, 4, 4), 1: KvShape(1, 8, 8), 2: KvShape(2, 4, 4)}
BLOCK = BlockBytes(full=16 * 4 * BLOCK_TOKENS, sliding=32 * 4 * BLOCK_TOKENS)
NUM_SEEN = 3
"""Blocks that hold what a token sees: 101 positions, wherever they begin."""


def make_pool(num_bytes: int) -> KvPool:
    return KvPool(
        SHAPES,
        budget_bytes=num_bytes,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sliding=SLIDING,
    )


def table(allocation: KvAllocation) -> KvAllocation:
    """Return the slots of the layers with a window."""
    assert allocation.sliding
    return allocation.sliding


def group(pool: KvPool) -> BlockGroup:
    assert pool.sliding
    return pool.sliding


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.integers(1, 2000),
    st.integers(1, 500),
    st.integers(1, 10**5),
    st.integers(0, 10**4),
)
def test_the_budget_is_divided_and_holds_the_longest_session_that_fits(
    full: int, sliding: int, window: int, pass_tokens: int, session_tokens: int, num_more: int
) -> None:
    layers = SlidingLayers(frozenset({0}), window, pass_tokens, session_tokens)
    block = BlockBytes(full, sliding)
    budget = full + sliding + num_more * full
    num_full, num_sliding = divide(budget, block, layers, BLOCK_TOKENS)
    assert 0 < num_full * full + num_sliding * sliding <= budget
    assert budget - (num_full * full + num_sliding * sliding) < full, "what is left is less than a block"
    # As long as the whole pool for all layers together would allow, and longer.
    num_even = budget // (full + sliding)
    assert num_full >= num_even
    assert num_sliding >= min(num_even, layers.most_blocks(BLOCK_TOKENS))


def test_what_fits_of_gemma_4_31b() -> None:
    """10 layers attend to all of a text, with 4 heads of 512; 50 to the last 1,024 tokens, with 16 of 256."""
    bytes_per_number, budget = 2, 40 * 2**30
    block = BlockBytes(
        full=10 * 4 * 512 * 2 * bytes_per_number * BLOCK_TOKENS,
        sliding=50 * 16 * 256 * 2 * bytes_per_number * BLOCK_TOKENS,
    )
    num_even = budget // (block.full + block.sliding)

    def num_texts(num_tokens: int, session_tokens: int) -> tuple[int, int]:
        """Return how many texts there is room for at a time, without and with giving back."""
        layers = SlidingLayers(frozenset(range(50)), 1024, 130, session_tokens)
        num_full, num_sliding = divide(budget, block, layers, BLOCK_TOKENS)
        length = num_tokens // BLOCK_TOKENS
        in_window = min(length, layers.usual_blocks(BLOCK_TOKENS))
        return num_even // length, min(num_full // length, num_sliding // in_window)

    lengths = (1024, 4096, 8192, 32768)
    assert [num_texts(length, length) for length in lengths] == [(46, 46), (11, 32), (5, 25), (1, 11)]
    # What was divided for texts of 4,096 tokens, the default, serves other lengths less well.
    assert [num_texts(length, 4096)[1] for length in lengths] == [38, 32, 16, 4]


@dataclass
class Text:
    """A session of the pool: one word fills a block."""

    words: list[int]
    allocation: KvAllocation

    @property
    def token_ids(self) -> list[int]:
        return [word for word in self.words for _ in range(BLOCK_TOKENS)] + [7]

    @property
    def keys(self) -> list[bytes]:
        return list(PrefixKeys(BLOCK_TOKENS).of(self.token_ids))


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 14),
    st.lists(
        st.tuples(
            st.sampled_from(["open", "grow", "grow", "give back", "keep", "free"]),
            st.integers(0, 99),
            st.lists(st.integers(1, 2), min_size=1, max_size=5),
        ),
        max_size=60,
    ),
)
def test_no_block_has_two_owners_and_what_is_found_holds_its_text(
    num_blocks: int, actions: list[tuple[str, int, list[int]]]
) -> None:
    pool, live = make_pool(num_blocks * (BLOCK.full + BLOCK.sliding)), list[Text]()
    contents: dict[str, dict[int, tuple[int, ...]]] = {"full": {}, "sliding": {}}
    numbers: dict[int, int] = {}
    for action, number, words in actions:
        text = live[number % len(live)] if live else None
        if action == "open":
            text = Text(words, KvAllocation((0,), None))
            shared = pool.find(text.keys[: len(words)], frozenset())
            num_gone = len(shared.blocks) - len(shared.sliding)
            for place, block in enumerate(shared.blocks):
                assert contents["full"][block] == tuple(words[: place + 1])
            for place, block in enumerate(shared.sliding):
                assert contents["sliding"][block] == tuple(words[: num_gone + place + 1])
            assert len(shared.sliding) >= min(len(shared.blocks), NUM_SEEN - 1)
            try:
                text.allocation = pool.allocate(len(text.token_ids), shared, will_grow=True)
            except (ResourceExhaustedError, InvalidArgumentError):
                continue
            live.append(text)
        elif text and action == "grow":
            grown = pool.grow(text.allocation, text.allocation.capacity + 1 + number)
            if grown is None:
                continue
            text.words += words * 4
            del text.words[grown.capacity // BLOCK_TOKENS :]
            text.allocation = grown
        elif text and action == "give back":
            text.allocation = pool.give_back(text.allocation, len(text.token_ids), text.keys)
            assert len(table(text.allocation).held_blocks) <= len(table(text.allocation).blocks)
        elif text and action == "keep":
            pool.keep(text.keys, text.allocation, frozenset())
        elif text and action == "free":
            live.remove(text)
            pool.free(text.allocation)
        check(pool, live, contents, numbers)
    for text in live:
        pool.free(text.allocation)
    for each in pool.groups.values():
        assert each.num_available == each.num_blocks


def check(
    pool: KvPool,
    live: list[Text],
    contents: dict[str, dict[int, tuple[int, ...]]],
    numbers: dict[int, int],
) -> None:
    """Compare a pool with what its sessions should have, and note what their blocks hold."""
    for name, each in pool.groups.items():
        held: dict[int, tuple[int, ...]] = {}
        for text in live:
            slots = text.allocation.table(name == "sliding")
            assert all(block == GONE for block in slots.blocks[: slots.num_gone])
            for place in range(slots.num_gone, len(slots.blocks)):
                content = (*text.words[: place + 1], *[0] * (place + 1 - len(text.words)))
                block = slots.blocks[place]
                if block in held:
                    assert place < len(text.words), "what somebody may write to belongs to him alone"
                    assert held[block] == content
                held[block] = content
        assert each.num_available == each.num_blocks - len(held)
        contents[name] |= {block: content for block, content in held.items() if 0 not in content}
    taken = group(pool).generations
    for text in live:
        window = pool.window_blocks(text.allocation)
        assert window
        assert window.block_ids == table(text.allocation).held_blocks
        assert window.generations == tuple(taken[list(window.block_ids)].tolist())
        assert min(window.generations) > 0
    for block, number in enumerate(taken.tolist()):
        if number and number != numbers.get(block):
            assert number > numbers.get(block, 0), "a later owner has a higher number"
            numbers[block] = number


def test_what_is_given_back_others_have_and_the_text_finds_again() -> None:
    pool = make_pool(40 * (BLOCK.full + BLOCK.sliding))
    num_blocks = group(pool).num_blocks
    first = Text([1] * 6, pool.allocate(6 * BLOCK_TOKENS + 1, will_grow=True))
    num_begun = len(table(first.allocation).blocks)
    assert num_begun == SLIDING.most_blocks(BLOCK_TOKENS) < 7
    first.allocation = pool.give_back(first.allocation, num_begun * BLOCK_TOKENS, first.keys)
    num_kept = group(pool).prefixes.num_idle
    assert group(pool).num_available == num_blocks - len(table(first.allocation).held_blocks)
    assert num_kept == table(first.allocation).num_gone > 0
    grown = pool.grow(first.allocation, 7 * BLOCK_TOKENS)
    assert grown
    pool.keep(first.keys, grown, frozenset())
    pool.free(grown)
    shared = pool.find(first.keys, frozenset())
    assert (len(shared.blocks), len(shared.sliding)) == (6, 2), "101 positions before the seventh block"
    # What is kept gives way to those who need it: the text is found as far as what follows sees is there.
    blocks = group(pool).take(num_blocks - 1, 1)
    assert pool.find(first.keys, frozenset()) == ((), ())
    assert len(pool.full.prefixes.find(first.keys, frozenset())) == 6
    group(pool).leave(blocks)


def test_a_pool_that_is_small_takes_no_text_that_would_never_fit() -> None:
    """The rest of the memory makes one more block for layers without a window, which is of no use then."""
    pool = make_pool(2 * (BLOCK.full + BLOCK.sliding) + BLOCK.full)
    assert (pool.full.num_blocks, group(pool).num_blocks) == (3, 2)
    assert pool.most_tokens == 2 * BLOCK_TOKENS
    with pytest.raises(InvalidArgumentError, match="whole pool holds 128"):
        pool.require_possible(2 * BLOCK_TOKENS + 1)
    most = SLIDING.most_blocks(BLOCK_TOKENS)
    large = make_pool(most * (BLOCK.full + BLOCK.sliding) + BLOCK.full)
    assert large.most_tokens == (most + 1) * BLOCK_TOKENS
    assert large.most_whole_tokens == most * BLOCK_TOKENS


def test_slots_that_were_given_back_cannot_be_read() -> None:
    pool = make_pool(40 * (BLOCK.full + BLOCK.sliding))
    allocation = pool.give_back(pool.allocate(4 * BLOCK_TOKENS), 4 * BLOCK_TOKENS)
    slots = table(allocation)
    assert slots.first == 2 * BLOCK_TOKENS
    for read in (
        lambda: slots.slots(slots.first - 1, slots.first + 3),
        lambda: slots.host_slots(0, slots.first + 3),
        lambda: slots.host_slots_at(numpy.array([slots.first + 1, slots.first - 1])),
        lambda: list(slots.runs(slots.first - 1, slots.first + 3)),
    ):
        with pytest.raises(AssertionError, match="given back"):
            read()
    for scattered in ((GONE, 5, 2, 9), (GONE, 5, 6, 7)):
        allocation = KvAllocation.of(scattered, torch.device("cpu"), num_gone=1)
        first = allocation.slots(BLOCK_TOKENS, BLOCK_TOKENS + 2)
        start = first.start if isinstance(first, slice) else int(first[0])
        assert start == 5 * BLOCK_TOKENS
        assert next(allocation.runs(2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS)).start == (
            scattered[2] * BLOCK_TOKENS
        )
    # Layers without a window have all of it.
    assert allocation.table(is_sliding=False) is allocation


def test_new_slots_are_cleared_in_the_layers_that_have_them() -> None:
    pool = make_pool(40 * (BLOCK.full + BLOCK.sliding))
    first = pool.allocate(7 * BLOCK_TOKENS, will_grow=True)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.fill_(7)
    length = table(first).length
    grown = pool.grow(first, 7 * BLOCK_TOKENS)
    assert grown
    pool.clear_before(grown, length - 5, length + 5)
    for layer, keys in pool.keys.items():
        slots = grown.table(pool.is_sliding(layer))
        assert (keys[slots.slots(0, length)] == 7).all()
        assert bool(keys[slots.slots(length, 7 * BLOCK_TOKENS)].any()) is not pool.is_sliding(layer)


@pytest.mark.parametrize(
    ("family", "sizes", "has_window"),
    [
        ("gemma4", {}, True),
        ("gemma4-shared-kv", {}, True),
        ("gemma2", {}, True),
        ("gemma4-moe", {}, True),
        ("gemma4", {"sliding_window": 512}, False),
        ("mistral", {}, False),
        ("llama", {}, False),
    ],
)
def test_who_has_blocks_for_windows(family: str, sizes: dict[str, int], has_window: bool) -> None:
    """Only models with both kinds of layers, whose window is shorter than their context."""
    model = tiny_model(family, **sizes)
    packed = PackedModel(model, kv_budget_bytes=1 << 20, giving_back=GivingBack(64, 256))
    assert (packed.pool.sliding is not None) is has_window
    if packed.pool.sliding:
        types = packed.attention_types
        assert {layer for layer in types if packed.pool.is_sliding(layer)} == {
            layer for layer, kind in types.items() if kind == "sliding_attention"
        }

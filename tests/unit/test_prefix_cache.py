"""Blocks that are kept by their text: what is found holds that text, whatever came and went meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.contract.errors import ResourceExhaustedError
from specdec.runtime.kv_pool import KvPool, KvShape
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.runtime.prefix_cache import PrefixKeys

NUM_BLOCKS = 9


def make_pool() -> KvPool:
    shape = KvShape(1, 1, 1)
    return KvPool(
        {0: shape},
        budget_bytes=NUM_BLOCKS * 2 * 4 * BLOCK_TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def text(*words: int, rest: int = 0) -> list[int]:
    """Return a text of full blocks, one for each word, and `rest` more tokens."""
    return [word for word in words for _ in range(BLOCK_TOKENS)] + [7] * rest


def keys(token_ids: Sequence[int], *owner: str) -> list[bytes]:
    return list(PrefixKeys(BLOCK_TOKENS, *owner).of(token_ids))


def held(pool: KvPool, token_ids: Sequence[int], names: frozenset[str] = frozenset()) -> KvAllocation:
    """Allocate for a text and keep its full blocks."""
    allocation = pool.allocate(len(token_ids), pool.find(keys(token_ids[:-1]), names))
    pool.keep(keys(token_ids), allocation, names)
    return allocation


def test_a_key_covers_all_before_and_whose_it_is() -> None:
    one, other = keys(text(1, 2, 3)), keys(text(9, 2, 3))
    assert len(one) == 3
    assert not set(one) & set(other)
    assert keys(text(1, 2, 3, rest=BLOCK_TOKENS - 1)) == one
    owners = [("a", "b"), ("ab", ""), ("", "ab"), ("a", ""), ()]
    assert len({keys(text(1), *owner)[0] for owner in owners}) == len(owners)


def test_keys_of_a_text_that_grows_are_those_of_the_whole() -> None:
    growing = PrefixKeys(BLOCK_TOKENS)
    whole = text(1, 2, 3, rest=5)
    for length in range(0, len(whole) + 1, 23):
        growing.of(whole[:length])
    assert list(growing.of(whole)) == keys(whole)


def test_the_same_beginning_is_shared_while_it_is_in_use_and_after() -> None:
    pool = make_pool()
    first = held(pool, text(1, 2, rest=3))
    second = held(pool, text(1, 2, 5, rest=3))
    assert (first.num_shared, second.num_shared) == (0, 2)
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(second.own_blocks) & set(first.blocks)
    pool.free(first)
    pool.free(second)
    assert pool.free_tokens == pool.capacity_tokens
    assert pool.full.prefixes.num_idle == 3
    assert held(pool, text(1, 2, 5, 6)).num_shared == 3


def test_of_what_is_kept_the_oldest_and_the_last_of_a_text_give_way_first() -> None:
    pool = make_pool()
    for words in ((1, 2, 3), (4, 5, 6)):
        pool.free(held(pool, text(*words, rest=1)))
    pool.free(pool.allocate(5 * BLOCK_TOKENS))  # three are free, so two have to go
    assert pool.full.prefixes.find(keys(text(1, 2, 3)), frozenset()) == list(
        held(pool, text(1, rest=1)).blocks[:1]
    )
    assert len(pool.full.prefixes.find(keys(text(4, 5, 6)), frozenset())) == 3


def test_blocks_without_the_hidden_states_are_not_shared_and_give_way_to_those_with_them() -> None:
    pool, names = make_pool(), frozenset({"hidden.1"})
    pool.free(held(pool, text(1, 2, rest=1)))
    with_states = held(pool, text(1, 2, rest=1), names)
    assert with_states.num_shared == 0
    pool.free(with_states)
    assert pool.full.prefixes.num_idle == 2
    again = held(pool, text(1, 2, rest=1), names)
    assert again.num_shared == 2
    assert held(pool, text(1, 2, rest=1)).num_shared == 2, "who needs none does with those that have them"
    pool.full.prefixes.forget_hidden("hidden.1")
    assert pool.full.prefixes.find(keys(text(1)), names) == []
    assert len(pool.full.prefixes.find(keys(text(1)), frozenset())) == 1


def test_a_refusal_leaves_what_is_shared_as_it_was() -> None:
    pool = make_pool()
    kept = held(pool, text(1, 2, rest=1))
    blocked = pool.allocate((NUM_BLOCKS - 3) * BLOCK_TOKENS)
    try:
        pool.allocate(len(text(1, 2, rest=1)), pool.find(keys(text(1, 2)), frozenset()))
    except ResourceExhaustedError:
        pass
    else:
        raise AssertionError("there was no room")
    pool.free(blocked)
    pool.free(kept)
    assert pool.free_tokens == pool.capacity_tokens
    assert pool.full.prefixes.num_idle == 2


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(1, 2), min_size=1, max_size=4), st.booleans()),
        max_size=50,
    )
)
def test_what_is_found_holds_that_text(actions: list[tuple[bool, list[int], bool]]) -> None:
    pool, live = make_pool(), list[KvAllocation]()
    content: dict[int, tuple[int, ...]] = {}
    for release, words, has_states in actions:
        if release and live:
            pool.free(live.pop(words[0] % len(live)))
            continue
        token_ids, names = text(*words, rest=1), frozenset({"h"} if has_states else set[str]())
        shared = pool.find(keys(token_ids[:-1]), names)
        for place, block in enumerate(shared.blocks):
            assert content[block] == tuple(words[: place + 1])
        try:
            allocation = pool.allocate(len(token_ids), shared)
        except ResourceExhaustedError:
            continue
        used = {block for each in live for block in each.blocks}
        assert not set(allocation.own_blocks) & used, "what somebody uses is never written to"
        for place, block in enumerate(allocation.blocks[: len(words)]):
            content[block] = tuple(words[: place + 1])
        pool.keep(keys(token_ids), allocation, names)
        live.append(allocation)
        in_use = {block for each in live for block in each.blocks}
        assert len(in_use) * BLOCK_TOKENS + pool.free_tokens == pool.capacity_tokens
    for allocation in live:
        pool.free(allocation)
    assert pool.free_tokens == pool.capacity_tokens

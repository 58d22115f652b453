"""How busy replicas are held to be, and which of them gets the next session."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio

from gateway.replicas.load import ReplicaLoad
from gateway.replicas.replica import Replica
from gateway.replicas.replica_set import NEAR_SESSIONS, ReplicaSet
from specdec.contract.load import Load, scarcest
from specdec.v1.verifier_pb2 import VerifierServiceGetInfoResponse

VERIFIER = "10.0.0.1:50051"
"""A verifier, beside which there may be drafters."""


def said(**fields: int) -> ReplicaLoad:
    """Return the load of a replica that has just said this."""
    load = ReplicaLoad()
    load.told(Load(**fields))
    return load


class TestLoad:
    def test_sessions_of_other_gateways_count(self) -> None:
        assert said(num_sessions=3).busyness == 3

    def test_a_session_counts_from_its_beginning_until_its_end(self) -> None:
        load = said(num_sessions=3)
        load.begin()
        load.begin()
        assert (load.busyness, load.num_sessions) == (5, 2)
        load.told(Load(num_sessions=4))
        load.opened()
        assert load.busyness == 5, "the answer that opens a session counts it; the other one is still opening"
        load.end(was_opened=False)
        assert load.busyness == 4
        load.end(was_opened=True)
        assert (load.busyness, load.num_sessions) == (3, 0)
        load.told(Load(num_sessions=3))
        assert load.busyness == 3

    def test_a_replica_that_does_not_say_has_the_sessions_of_this_gateway(self) -> None:
        load = ReplicaLoad()
        for _ in range(2):
            load.begin()
            load.opened()
        load.begin()
        assert load.busyness == 3
        load.end(was_opened=True)
        assert load.busyness == 2

    def test_nobody_is_idler_than_this_gateway_knows(self) -> None:
        load = said(num_sessions=0)
        load.begin()
        load.opened()
        assert load.busyness == 1

    def test_work_that_waits_counts(self) -> None:
        assert said(num_sessions=2, num_waiting=3).busyness == 5

    def test_a_long_session_takes_the_room_of_several(self) -> None:
        room = {"max_sessions": 16, "kv_capacity_tokens": 16_000}
        assert said(num_sessions=2, kv_free_tokens=8_000, **room).busyness == 8
        assert said(num_sessions=9, kv_free_tokens=8_000, **room).busyness == 9

    def test_who_ends_gives_its_room_back(self) -> None:
        load = said(num_sessions=1, max_sessions=16, kv_capacity_tokens=16, kv_free_tokens=8)
        load.begin()
        load.opened()
        assert load.busyness == 8
        load.end(was_opened=True)
        assert load.busyness == 0

    @pytest.mark.parametrize(
        ("fields", "is_full"),
        [
            ({"num_sessions": 3, "max_sessions": 4}, False),
            ({"num_sessions": 4, "max_sessions": 4}, True),
            ({"num_sessions": 1, "max_sessions": 4, "kv_capacity_tokens": 64}, True),
            ({"num_sessions": 100}, False),
        ],
    )
    def test_full_is_without_a_slot_or_without_kv(self, fields: dict[str, int], is_full: bool) -> None:
        assert said(**fields).is_full == is_full

    def test_sessions_that_open_fill_a_replica(self) -> None:
        load = said(num_sessions=3, max_sessions=4)
        load.begin()
        assert load.is_full
        load.end(was_opened=False)
        assert not load.is_full

    def test_a_pool_with_more_free_than_it_holds_is_an_empty_one(self) -> None:
        assert said(max_sessions=8, kv_capacity_tokens=10, kv_free_tokens=2**32 - 1).busyness == 0

    def test_the_scarcest_pool_counts(self) -> None:
        assert scarcest([(100, 50), (1000, 400), (10, 10)]) == (1000, 400)
        assert scarcest([]) == (0, 0)

    def test_a_message_says_all_of_it(self) -> None:
        load = Load(1, 2, 3, 4, 5)
        assert Load.from_proto(load.to_proto()) == load


MakeSet = Callable[..., ReplicaSet[VerifierServiceGetInfoResponse]]


@pytest_asyncio.fixture
async def make_set() -> AsyncIterator[MakeSet]:
    """Make sets of ready replicas, of each of which it is given how many sessions it has."""
    sets = []

    async def get_info(_: object) -> None: ...

    def make(sessions: Sequence[int], *, hosts: Sequence[int] = (), seed: int = 0) -> ReplicaSet[Any]:
        hosts = hosts or range(2, 2 + len(sessions))
        uris = [f"10.0.0.{host}:{50052 + index}" for index, host in enumerate(hosts)]
        made: ReplicaSet[VerifierServiceGetInfoResponse] = ReplicaSet(
            "", uris, get_info=get_info, check=lambda _: None, rng=random.Random(seed)
        )
        for replica, count in zip(made.replicas, sessions, strict=True):
            replica.reason, replica.info = "", VerifierServiceGetInfoResponse()
            replica.load.told(Load(num_sessions=count, max_sessions=64))
        sets.append(made)
        return made

    yield make
    for made in sets:
        await made.close()


def picks(replicas: ReplicaSet[Any], count: int, **how: Any) -> Counter[int]:
    """Pick so many times, without a session on any; return how often each replica was."""
    return Counter(replicas.replicas.index(replicas.pick(**how)) for _ in range(count))


class TestChoice:
    async def test_the_better_of_two_is_taken(self, make_set: MakeSet) -> None:
        assert picks(make_set([3, 2]), 50) == {1: 50}
        assert picks(make_set([2]), 50) == {0: 50}

    async def test_equals_take_turns_by_lot(self, make_set: MakeSet) -> None:
        counts = picks(make_set([2, 2]), 100)
        assert min(counts[0], counts[1]) > 20

    async def test_of_many_two_are_drawn_and_the_better_is_taken(self, make_set: MakeSet) -> None:
        counts = picks(make_set([5, 4, 9, 0]), 600)
        assert counts[2] == 0, "the busiest of all is never the better of two"
        assert counts[3] > counts[1] > counts[0] > 50, (
            "not all go to the idlest: other gateways choose as well"
        )

    async def test_the_lots_can_be_repeated(self, make_set: MakeSet) -> None:
        def drawn(seed: int) -> list[str]:
            replicas = make_set([1, 1, 1, 1], seed=seed)
            return [replicas.pick().uri for _ in range(20)]

        assert drawn(1) == drawn(1)
        assert drawn(1) != drawn(2)

    async def test_requests_that_come_together_spread(self, make_set: MakeSet) -> None:
        replicas = make_set([0, 0])
        leases = [replicas.pick().lease() for _ in range(10)]
        assert [replica.num_sessions for replica in replicas.replicas] == [5, 5]
        for lease in leases:
            lease.end()
        assert [replica.load.busyness for replica in replicas.replicas] == [0, 0]

    async def test_a_gateway_does_not_send_more_where_another_one_has(self, make_set: MakeSet) -> None:
        replicas = make_set([6, 0])
        leases = [replicas.pick().lease() for _ in range(6)]
        assert [replica.num_sessions for replica in replicas.replicas] == [0, 6]
        for lease in leases:
            lease.end()

    async def test_a_full_one_comes_last(self, make_set: MakeSet) -> None:
        replicas = make_set([4, 60, 62])
        replicas.replicas[0].load.told(Load(num_sessions=4, max_sessions=4))
        assert picks(replicas, 100)[0] == 0
        (full,) = replicas.replicas[:1]
        assert replicas.pick(without=replicas.replicas[1:]) is full

    async def test_one_that_rests_comes_last(self, make_set: MakeSet) -> None:
        replicas = make_set([0, 10, 20])
        for _ in range(3):
            replicas.replicas[0].failed()
        assert picks(replicas, 50) == {1: 50}

    async def test_a_near_one_goes_first_until_it_is_much_busier(self, make_set: MakeSet) -> None:
        far = [0] * 8
        hosts = [*range(2, 10), 1]
        near = 8
        for busyness, chosen in ((NEAR_SESSIONS, near), (NEAR_SESSIONS + 1, None)):
            counts = picks(make_set([*far, busyness], hosts=hosts), 50, near=VERIFIER)
            assert (counts[near] == 50) == (chosen == near)
            assert (counts[near] == 0) == (chosen is None)

    async def test_of_several_near_ones_the_better_is_taken(self, make_set: MakeSet) -> None:
        assert picks(make_set([0, 2, 1], hosts=[2, 1, 1]), 50, near=VERIFIER) == {2: 50}

    async def test_a_near_one_that_is_full_is_left_alone(self, make_set: MakeSet) -> None:
        assert picks(make_set([0, 64], hosts=[2, 1]), 20, near=VERIFIER) == {0: 20}


async def test_a_lease_counts_once_whatever_is_told_of_it() -> None:
    replica: Replica[VerifierServiceGetInfoResponse] = Replica("127.0.0.1:1", "")
    lease = replica.lease()
    lease.opened()
    lease.opened()
    assert replica.load.busyness == 1
    lease.end()
    lease.end()
    lease.opened()
    assert (replica.load.busyness, replica.num_sessions) == (0, 0)
    await replica.close()

"""Verify and Draft streams, several at a time: anything is said on them, in any order, and left at once."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import grpc
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from specdec.v1 import drafter_pb2, target_state_pb2, verifier_pb2
from tests.fuzz.messages import Mistake, mistakes
from tests.fuzz.peers import DraftPeer, Peer, VerifyPeer
from tests.fuzz.world import PROPER, World, code_of, fuzzing
from tests.slow import quick_only

MAX_PEERS = 5
VERIFY_REQUEST = verifier_pb2.VerifyRequest.DESCRIPTOR
DRAFT_REQUEST = drafter_pb2.DraftRequest.DESCRIPTOR

PeerT = TypeVar("PeerT", bound=Peer)


class Sessions(RuleBasedStateMachine):
    """Hypothesis plays all peers."""

    world: World
    verifying = Bundle("verifying")
    drafting = Bundle("drafting")
    peers = verifying | drafting

    def __init__(self) -> None:
        super().__init__()
        self._peers: list[Peer] = []
        self._readers: list[Any] = []

    @initialize(target=verifying)
    def begin(self) -> VerifyPeer:
        return self._add(VerifyPeer(self.world), num_messages=2)

    @precondition(lambda self: len(self._peers) < MAX_PEERS)
    @rule(target=verifying, num_messages=st.integers(0, 3))
    def verify(self, num_messages: int) -> VerifyPeer:
        return self._add(VerifyPeer(self.world), num_messages)

    @precondition(lambda self: len(self._peers) < MAX_PEERS)
    @rule(
        target=drafting,
        drafter=st.sampled_from(("probe", "model", "ngram")),
        followed=verifying,
        num_messages=st.integers(0, 3),
    )
    def draft(self, drafter: str, followed: VerifyPeer, num_messages: int) -> DraftPeer:
        return self._add(DraftPeer(self.world, drafter, followed), num_messages)

    def _add(self, peer: PeerT, num_messages: int) -> PeerT:
        self._peers.append(peer)
        self.converse(peer, num_messages)
        return peer

    @rule(peer=peers, num_messages=st.integers(1, 4))
    def converse(self, peer: Peer, num_messages: int) -> None:
        """Say what is right, and hear the answers."""
        for _ in range(num_messages):
            while peer.num_unanswered and not peer.is_over:
                peer.read()
            right = None if peer.is_over else peer.right()
            if right is None:
                return
            peer.say(right.SerializeToString(), is_right=peer.may_be_answered)
            peer.read()

    @rule(peer=verifying, mistake=mistakes(VERIFY_REQUEST), hears=st.booleans())
    def mislead_verifier(self, peer: VerifyPeer, mistake: Mistake, hears: bool) -> None:
        self._mislead(peer, mistake, hears)

    @rule(peer=drafting, mistake=mistakes(DRAFT_REQUEST), hears=st.booleans())
    def mislead_drafter(self, peer: DraftPeer, mistake: Mistake, hears: bool) -> None:
        self._mislead(peer, mistake, hears)

    def _mislead(self, peer: Peer, mistake: Mistake, hears: bool) -> None:
        """Send something wrong; wait for its effect, or do not."""
        right = None if peer.is_over else peer.right()
        if right is not None:
            peer.say(mistake(right.SerializeToString()), is_right=False)
            if hears:
                peer.read()

    @rule(peer=consumes(verifying) | consumes(drafting), how=st.sampled_from(("close", "leave", "forget")))
    def finish(self, peer: Peer, how: str) -> None:
        """Say that nothing more will be sent, or leave, or fall silent."""
        if how == "close":
            peer.close()
        if how == "leave":
            self._peers.remove(peer)
            assert peer.leave() in PROPER

    @rule(peer=verifying, start=st.integers(0, 60) | st.integers(0, 2**32 - 1), reads=st.booleans())
    def follow_state(self, peer: VerifyPeer, start: int, reads: bool) -> None:
        """Ask for a session's state, and read it or do not."""
        session_id = peer.state.session_id if peer.state is not None else ""
        request = target_state_pb2.StreamTargetStateRequest(session_id=session_id, start_position=start)
        self._readers.append(self.world.run(self._follow(request, reads and start < 8)))

    async def _follow(self, request: Any, reads: bool) -> Any:
        path = "/specdec.v1.VerifierService/StreamTargetState"
        call: Any = self.world.channels["verifier"].unary_stream(path)(
            request.SerializeToString(), timeout=60
        )
        if reads:
            try:
                async with asyncio.timeout(30):
                    await call.read()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
        return call

    def teardown(self) -> None:
        for peer in self._peers:
            assert peer.leave() in PROPER
        for call in self._readers:
            assert self.world.run(self._end(call)) in PROPER
        self.world.run(self.world.assert_whole())

    async def _end(self, call: Any) -> grpc.StatusCode:
        call.cancel()
        return await code_of(call)


@pytest.mark.parametrize("num_examples", quick_only([15, 50], [15]))
def test_sessions_survive_anything(num_examples: int, world: World) -> None:
    machine = type("SessionsHere", (Sessions,), {"world": world})
    run_state_machine_as_test(machine, settings=fuzzing(num_examples, stateful_step_count=25))

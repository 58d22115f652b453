"""Verify and Draft streams, several at a time: anything is said on them, in any order, and left at once."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    rule,
    run_state_machine_as_test,
)

from specdec.v1 import target_state_pb2
from tests.fuzz.messages import wrong
from tests.fuzz.peers import DraftPeer, Peer, VerifyPeer
from tests.fuzz.world import PROPER, World, fuzzing


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
        return self.verify()

    @rule(target=verifying)
    def verify(self) -> VerifyPeer:
        peer = VerifyPeer(self.world)
        self._peers.append(peer)
        return peer

    @rule(target=drafting, drafter=st.sampled_from(("ngram", "model", "probe")), followed=verifying)
    def draft(self, drafter: str, followed: VerifyPeer) -> DraftPeer:
        peer = DraftPeer(self.world, drafter, followed)
        self._peers.append(peer)
        return peer

    @rule(peer=peers, num_messages=st.integers(1, 4))
    def converse(self, peer: Peer, num_messages: int) -> None:
        """Say what is right, and hear the answer."""
        while peer.num_unanswered and not peer.is_over:
            peer.read()
        for _ in range(num_messages):
            if peer.is_over or peer.has_closed or (right := peer.right()) is None:
                return
            peer.say(right.SerializeToString(), is_right=self._may_be_answered(peer))
            peer.read()

    def _may_be_answered(self, peer: Peer) -> bool:
        """Whether nothing but a defect would be a reason not to answer."""
        followed = peer.followed if isinstance(peer, DraftPeer) else peer
        return followed.is_honest and not followed.is_over

    @rule(peer=peers, data=st.data())
    def mislead(self, peer: Peer, data: st.DataObject) -> None:
        """Say something wrong, and do not wait for what comes of it."""
        right = peer.right()
        if right is not None and not peer.has_closed and not peer.is_over:
            peer.say(data.draw(wrong(right)), is_right=False)

    @rule(peer=peers)
    def hear(self, peer: Peer) -> None:
        if peer.num_unanswered:
            peer.read()

    @rule(peer=peers)
    def close(self, peer: Peer) -> None:
        peer.close()

    @rule(peer=consumes(verifying) | consumes(drafting))
    def leave(self, peer: Peer) -> None:
        self._peers.remove(peer)
        assert peer.leave() in PROPER

    @rule(peer=verifying, start=st.integers(0, 60) | st.integers(0, 2**32 - 1), reads=st.booleans())
    def follow_state(self, peer: VerifyPeer, start: int, reads: bool) -> None:
        """Ask for a session's state, and read it or not."""
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
        code: grpc.StatusCode = await call.code()
        return code


def test_sessions_survive_anything(world: World) -> None:
    machine = type("SessionsHere", (Sessions,), {"world": world})
    run_state_machine_as_test(machine, settings=fuzzing(50, stateful_step_count=25))

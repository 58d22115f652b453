"""Peers that hold Verify and Draft streams: they know what would be right to say next, and say anything."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message

from specdec.transport.handshake import make_handshake
from specdec.v1 import drafter_pb2, verifier_pb2
from tests.fuzz.world import NUM_TOKENS, World, code_of
from tests.refusals import PROMPT
from tests.state_probe import all_of

ANSWER_S = 30.0
"""An answer that takes longer never comes."""
DRAFT_DEPTH = 3


class Peer:
    """One bidirectional stream, of bytes."""

    service = ""
    path = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_honest = True
        """Whether all that was said was right; then all that is answered must be."""
        self.is_opened = False
        self.num_unanswered = 0
        self.has_closed = False
        self.call: Any = world.run(self._start())

    async def _start(self) -> Any:
        return self.world.channels[self.service].stream_stream(self.path)(timeout=4 * ANSWER_S)

    @property
    def is_over(self) -> bool:
        """Whether the call has ended."""
        return bool(self.call.done())

    @property
    def may_be_answered(self) -> bool:
        """Whether only a defect could be a reason not to answer a right message."""
        return not self.has_closed

    def right(self) -> Message | None:
        """Return the message that would be right to send next; None: there is nothing more to send."""
        raise NotImplementedError

    def hear(self, answer: bytes) -> None:
        """Check an answer of an honest conversation."""
        raise NotImplementedError

    def say(self, message: bytes, *, is_right: bool) -> None:
        """Send a message without waiting for its effect."""
        self.is_honest &= is_right and not self.num_unanswered
        self.num_unanswered += 1
        self.world.run(self._write(message))

    async def _write(self, message: bytes) -> None:
        try:
            await self.call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            await self.call.code()  # it has ended

    def read(self) -> None:
        """Await an answer or the end of the stream: every message leads to one of them."""
        answer = self.world.run(self._read())
        if answer is grpc.aio.EOF:
            assert not self.is_honest or self.has_closed, self.world.run(self.call.details())
            self.num_unanswered = 0
            return
        self.num_unanswered -= 1
        if self.is_honest:
            self.hear(answer)

    async def _read(self) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self.call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return grpc.aio.EOF

    def close(self) -> None:
        """Tell the service that nothing more will be sent."""
        self.has_closed = True
        self.world.run(self._close())

    async def _close(self) -> None:
        if not self.call.done():
            await self.call.done_writing()

    def leave(self) -> grpc.StatusCode:
        """Cancel the call if it has not ended, and return what it ended with."""
        return self.world.run(self._leave())

    async def _leave(self) -> grpc.StatusCode:
        self.call.cancel()
        return await code_of(self.call)


class VerifyPeer(Peer):
    """A session on the verifier that exports all its state."""

    service, path = "verifier", "/specdec.v1.VerifierService/Verify"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.token_ids = list(PROMPT)
        self.state: Any = None
        self._draft: list[int] = []

    def right(self) -> Message | None:
        if not self.is_opened:
            opening = verifier_pb2.VerifyOpen(
                handshake=make_handshake(),
                committed_token_ids=PROMPT,
                max_new_tokens=NUM_TOKENS,
                ignore_eos=True,
                target_state_spec=all_of("llama").to_proto(),
            )
            return verifier_pb2.VerifyRequest(open=opening)
        length = len(self.token_ids)
        if length == len(self.world.expected):
            return None
        # Right drafts, wrong ones and none take turns.
        draft = [self.world.expected[length : length + 3], [1, 2, 3], []][length % 3]
        self._draft = draft
        return verifier_pb2.VerifyRequest(
            round=verifier_pb2.VerifyRound(base_committed_length=length, draft_token_ids=draft)
        )

    def hear(self, answer: bytes) -> None:
        response = verifier_pb2.VerifyResponse.FromString(answer)
        result = response.opened.first if response.HasField("opened") else response.result
        if response.HasField("opened"):
            self.is_opened, self.state = True, result.target_state
        self.token_ids += [*self._draft[: result.num_accepted_tokens], result.bonus_token_id]
        self.state.cached_length = result.cached_length
        assert self.token_ids == self.world.expected[: len(self.token_ids)]
        assert result.committed_length == len(self.token_ids)


class DraftPeer(Peer):
    """A session on the drafter that follows one on the verifier."""

    service, path = "drafter", "/specdec.v1.DrafterService/Draft"

    def __init__(self, world: World, drafter: str, followed: VerifyPeer) -> None:
        super().__init__(world)
        self._drafter, self.followed = drafter, followed
        self._num_sent = 0

    @property
    def may_be_answered(self) -> bool:
        followed = self.followed
        # A session that was told that nothing more will come ends, and its state with it, before its call.
        return followed.is_honest and not followed.has_closed and not followed.is_over

    def right(self) -> Message | None:
        followed = self.followed
        if self._drafter == "probe" and (not followed.is_opened or followed.is_over):
            return None
        token_ids = followed.token_ids
        new, self._num_sent = token_ids[self._num_sent :], len(token_ids)
        if not self.is_opened:
            opening = drafter_pb2.DraftOpen(
                handshake=make_handshake(),
                drafter=self._drafter,
                committed_token_ids=new,
                max_length=len(self.world.expected),
            )
            return drafter_pb2.DraftRequest(open=opening)
        message = drafter_pb2.DraftRound(
            committed_token_ids=new, committed_length=len(token_ids), draft_depth=DRAFT_DEPTH
        )
        if followed.state is not None:
            message.target_state.CopyFrom(followed.state)
        return drafter_pb2.DraftRequest(round=message)

    def hear(self, answer: bytes) -> None:
        response = drafter_pb2.DraftResponse.FromString(answer)
        assert response.HasField("result") == self.is_opened
        self.is_opened = True
        draft = list(response.result.draft_token_ids)
        assert len(draft) <= DRAFT_DEPTH
        if self._drafter == "model":  # the target itself
            assert draft == self.world.expected[self._num_sent :][: len(draft)]

"""Kinds of lies of a drafter, in its drafts and in its streams."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2

from specdec.transport.handshake import make_handshake
from specdec.v1 import common_pb2, drafter_pb2
from tests.hostile.liar import Liar, Part, Requests, lying_timings
from tests.hostile.scene import BOUND_S, DRAFT_TIMEOUT_S
from tests.tiny_models import VOCAB_SIZE

MANY = 1_900_000
"""Token ids of a message just below the largest that is received."""

Response, Result = drafter_pb2.DraftResponse, drafter_pb2.DraftResult

# Lies in the answer to a round

Tell = Callable[[Liar, drafter_pb2.DraftRound], Any]


def tokens(*token_ids: int, parents: Sequence[int] = ()) -> Any:
    """Return a proposal of these tokens."""
    return Response(result=Result(draft_token_ids=token_ids, parent_indices=parents))


def at_random(liar: Liar, message: drafter_pb2.DraftRound) -> Any:
    rng = random.Random(len(liar.committed))
    return tokens(*(rng.randrange(VOCAB_SIZE) for _ in range(message.draft_depth)))


def always_wrong(liar: Liar, message: drafter_pb2.DraftRound) -> Any:
    right = liar.expected[len(liar.committed) :][: message.draft_depth]
    return tokens(*((token + 1) % VOCAB_SIZE for token in right))


def random_tree(liar: Liar, message: drafter_pb2.DraftRound) -> Any:
    rng = random.Random(len(liar.committed))
    nodes = range(max(message.draft_nodes, 2))
    return tokens(
        *(rng.randrange(VOCAB_SIZE) for _ in nodes),
        parents=[rng.randrange(-1, node) if node else -1 for node in nodes],
    )


def negative_ids(liar: Liar, message: drafter_pb2.DraftRound) -> Any:
    minus_one = b"\xff" * 9 + b"\x01"  # as a varint: ten bytes
    return b"\x12" + bytes([2 + len(minus_one)]) + b"\x0a" + bytes([len(minus_one)]) + minus_one


def out_of_time(liar: Liar, message: drafter_pb2.DraftRound) -> Any:
    result = Result(draft_token_ids=[5], timings=lying_timings())
    return Response(result=result)


def a_load_past_all_bounds(liar: Liar, message: drafter_pb2.DraftRound) -> Any:
    most = 2**32 - 1
    load = common_pb2.Load(max_sessions=most, num_waiting=most, kv_capacity_tokens=1, kv_free_tokens=most)
    return Response(result=Result(draft_token_ids=[5], load=load))


ROUNDS: dict[str, Tell] = {
    "random tokens": at_random,
    "always wrong": always_wrong,
    "a random tree": random_tree,
    "nothing": lambda liar, message: tokens(),
    "one too many": lambda liar, message: tokens(*[5] * (message.draft_depth + 1)),
    "thousands": lambda liar, message: tokens(*[5] * 5000),
    "millions": lambda liar, message: tokens(*[5] * MANY),
    "millions in a tree": lambda liar, message: tokens(*range(200_000), parents=[-1] * 200_000),
    "millions of parents": lambda liar, message: tokens(5, parents=[-1] * 700_000),
    "past the vocabulary": lambda liar, message: tokens(VOCAB_SIZE),
    "the largest id": lambda liar, message: tokens(5, 2**32 - 1),
    "negative ids": negative_ids,
    "its own parent": lambda liar, message: tokens(5, 6, parents=[-1, 1]),
    "a cycle": lambda liar, message: tokens(5, 6, parents=[1, 0]),
    "a parent that follows": lambda liar, message: tokens(5, 6, 7, parents=[-1, 2, 0]),
    "a parent far away": lambda liar, message: tokens(5, parents=[2**31 - 1]),
    "the least parent": lambda liar, message: tokens(5, parents=[-(2**31)]),
    "too few parents": lambda liar, message: tokens(5, 6, 7, parents=[-1, 0]),
    "too many parents": lambda liar, message: tokens(5, parents=[-1, 0, 1]),
    "parents only": lambda liar, message: tokens(parents=[-1, -1]),
    "equal siblings": lambda liar, message: tokens(5, 5, parents=[-1, -1]),
    "a tree too deep": lambda liar, message: tokens(*range(10), parents=[-1, -1, *range(1, 9)]),
    "times of its own": out_of_time,
    "a load past all bounds": a_load_past_all_bounds,
    "an opened": lambda liar, message: Response(opened=drafter_pb2.DraftOpened()),
    "an empty message": lambda liar, message: b"",
    "fields nobody knows": lambda liar, message: b"\xfa\x3f\x04abcd",
    "no message": lambda liar, message: b"\xff" * 100,
}


class TellsInRounds(Liar):
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        return self._tell(self, message)


# Lies in the stream itself


class SilentAtOpen(Liar):
    async def open(self, message: drafter_pb2.DraftOpen) -> Any:
        await asyncio.sleep(BOUND_S)


class SilentInRounds(Liar):
    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        await asyncio.sleep(BOUND_S)


class Late(Liar):
    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        await asyncio.sleep(DRAFT_TIMEOUT_S * 1.2)
        return tokens(5)


class OneBehind(Liar):
    """Answers each round with what may have been right for the one before."""

    last: Any = None

    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        self.last, answer = tokens(*self.expected[len(self.committed) :][:4]), self.last
        return answer or tokens(1, 2, 3, 4)


class ClosesAtOpen(Liar):
    async def session(self, requests: Requests, context: Part) -> None:
        return


class ClosesInRound(Liar):
    async def session(self, requests: Requests, context: Part) -> None:
        async for request in requests:
            if request.WhichOneof("message") == "round":
                return
            await context.write(await self.open(request.open))


class AnswersOpenWithADraft(Liar):
    async def open(self, message: drafter_pb2.DraftOpen) -> Any:
        return tokens(5, 6)


class OtherVersion(Liar):
    async def open(self, message: drafter_pb2.DraftOpen) -> Any:
        handshake = make_handshake()
        handshake.protocol_version = 99
        return Response(opened=drafter_pb2.DraftOpened(handshake=handshake))


class OtherVocabulary(Liar):
    async def open(self, message: drafter_pb2.DraftOpen) -> Any:
        handshake = make_handshake("x" * 3_000_000, "\N{JAPANESE OGRE}" * 1_000_000)
        return Response(opened=drafter_pb2.DraftOpened(handshake=handshake))


class TooLarge(Liar):
    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        return tokens(*[5] * 20_000_000)


class Floods(Liar):
    """Sends drafts nobody asked for as fast as they are taken."""

    async def session(self, requests: Requests, context: Part) -> None:
        async for request in requests:
            await context.write(await self.open(request.open))
            while True:
                await context.write(tokens(1, 2, 3, 4))


class Aborts(Liar):
    """Ends every round with a status of its own."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str | bytes], ...] = ()
    ) -> None:
        super().__init__()
        self._status = (code, details, trailing)

    async def session(self, requests: Requests, context: Part) -> None:
        async for request in requests:
            if request.WhichOneof("message") == "round":
                await context.abort(*self._status)
            await context.write(await self.open(request.open))


DETAILS = "grpc-status-details-bin"
UNREADABLE_REASON = status_pb2.Status(
    code=3, details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")]
).SerializeToString()
UGLY = "\x1b[2J\r\n\x00\N{JAPANESE OGRE}" * 100

STREAMS: dict[str, Callable[[], Liar]] = {
    "silence at the open": SilentAtOpen,
    "silence in rounds": SilentInRounds,
    "drafts too late": Late,
    "drafts of the last round": OneBehind,
    "a stream that ends at once": ClosesAtOpen,
    "a stream that ends in a round": ClosesInRound,
    "a draft for an open": AnswersOpenWithADraft,
    "another protocol": OtherVersion,
    "another vocabulary": OtherVocabulary,
    "messages above the limit": TooLarge,
    "a flood": Floods,
    "a status of no meaning": lambda: Aborts(grpc.StatusCode.DATA_LOSS, "?"),
    "a deadline that did not pass": lambda: Aborts(grpc.StatusCode.DEADLINE_EXCEEDED, "late"),
    "a request that was not cancelled": lambda: Aborts(grpc.StatusCode.CANCELLED, "cancelled"),
    "ugly details": lambda: Aborts(grpc.StatusCode.INTERNAL, UGLY),
    "long details": lambda: Aborts(grpc.StatusCode.UNAVAILABLE, "x" * 7000),
    "huge details": lambda: Aborts(grpc.StatusCode.INTERNAL, "x" * 1_000_000),
    "details that are no status": lambda: Aborts(grpc.StatusCode.INTERNAL, "", ((DETAILS, b"\xff" * 50),)),
    "details of another kind": lambda: Aborts(
        grpc.StatusCode.INVALID_ARGUMENT,
        "",
        ((DETAILS, UNREADABLE_REASON),),
    ),
}

LIARS: dict[str, Callable[[], Liar]] = {
    **{name: lambda tell=tell: TellsInRounds(tell) for name, tell in ROUNDS.items()},  # type: ignore[misc]
    **STREAMS,
}

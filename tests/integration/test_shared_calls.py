"""Calls that many sessions share: each session is served as if the call were its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.replicas.sessions import VERIFYING
from gateway.replicas.shared_calls import SharedCalls
from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    from_end,
    from_rpc_error,
)
from specdec.service.host import ServiceHost
from specdec.service.interceptors import OpenCalls
from specdec.service.shared_call import serve_many
from specdec.transport.channel import aio_channel
from specdec.transport.handshake import make_handshake
from specdec.transport.outbox import MAX_ITEM_BYTES
from specdec.v1 import common_pb2, verifier_pb2, verifier_pb2_grpc
from tests.raw_streams import output_of, until
from tests.refusals import PROMPT
from tests.systems import running_verifier
from verifier_service.server import VerifierServer

BEGIN = common_pb2.SESSION_CHANGE_BEGIN
DONE = common_pb2.SESSION_CHANGE_DONE
CANCEL = common_pb2.SESSION_CHANGE_CANCEL
Item = verifier_pb2.VerifyManyRequest.Item
Request = verifier_pb2.VerifyRequest
MAX_SESSIONS = 3


def opening(**fields: Any) -> verifier_pb2.VerifyRequest:
    right = {"handshake": make_handshake(), "committed_token_ids": PROMPT, "max_new_tokens": 8}
    return Request(open=verifier_pb2.VerifyOpen(**(right | {"ignore_eos": True} | fields)))


def plain_round(length: int) -> verifier_pb2.VerifyRequest:
    return Request(round=verifier_pb2.VerifyRound(base_committed_length=length))


class Call:
    """A shared call by hand."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.messages: list[Any] = []
        """What was received."""

    async def say(self, *items: verifier_pb2.VerifyManyRequest.Item) -> None:
        """Send items in one message."""
        await self.call.write(verifier_pb2.VerifyManyRequest(items=items))

    async def hear(self, num_items: int) -> list[Any]:
        """Receive so many items; fewer if the call ends."""
        heard: list[Any] = []
        while len(heard) < num_items:
            try:
                async with asyncio.timeout(30):
                    message = await self.call.read()
            except grpc.aio.AioRpcError:
                break
            if message is grpc.aio.EOF:
                break
            self.messages.append(message)
            heard += message.items
        return heard

    async def end_of(self, session: int) -> SpecdecError | None:
        """Return what a session ended with, None in order; other items are dropped."""
        while items := await self.hear(1):
            for item in items:
                if item.session == session and item.HasField("end"):
                    return from_end(item.end) if item.end.code else None
        raise AssertionError("the call ended")

    async def error(self) -> SpecdecError:
        """Return what the call ended with."""
        call = self.call
        metadata = await call.initial_metadata(), await call.trailing_metadata()
        return from_rpc_error(grpc.aio.AioRpcError(await call.code(), *metadata, await call.details()))


@asynccontextmanager
async def shared_call(address: str) -> AsyncIterator[Call]:
    async with aio_channel(address) as channel:
        call: Any = verifier_pb2_grpc.VerifierServiceStub(channel).VerifyMany(timeout=60)
        yield Call(call)
        call.cancel()


@pytest.fixture
async def verifier(tiny_llama: Path) -> AsyncIterator[VerifierServer]:
    async with running_verifier(tiny_llama, max_sessions=MAX_SESSIONS) as (_, server):
        yield server


async def assert_free(verifier: VerifierServer) -> None:
    served = verifier.servicer.verifier
    assert served
    await until(lambda: served.num_sessions == 0)
    assert served.pool.free_tokens == served.pool.capacity_tokens


async def test_sessions_of_a_call_say_what_they_would_say_alone(verifier: VerifierServer) -> None:
    expected = await output_of(verifier.host.address, PROMPT, max_new_tokens=8, ignore_eos=True)
    tokens: dict[int, list[int]] = {1: [], 2: [], 3: []}
    async with shared_call(verifier.host.address) as call:
        await call.say(*(Item(session=number, change=BEGIN, request=opening()) for number in tokens))
        for _ in range(8):
            for item in await call.hear(3):
                result = item.response.opened.first if not tokens[item.session] else item.response.result
                tokens[item.session].append(result.bonus_token_id)
            lengths = {number: len(PROMPT) + len(output) for number, output in tokens.items()}
            if len(tokens[1]) < 8:
                await call.say(
                    *(Item(session=number, request=plain_round(lengths[number])) for number in tokens)
                )
        assert list(tokens.values()) == [expected] * 3
        # Rounds that share a pass share the message of their answers.
        assert len(call.messages) <= 16
        await call.say(*(Item(session=number, change=DONE) for number in tokens))
        ends = await call.hear(3)
        assert [item.end.code for item in ends] == [0, 0, 0]
        await assert_free(verifier)


async def test_a_session_that_fails_does_not_concern_the_others(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        await call.say(
            Item(session=1, change=BEGIN, request=opening()),
            Item(session=2, change=BEGIN, request=opening(committed_token_ids=[10**9])),
            Item(session=3, change=BEGIN, request=plain_round(3)),
        )
        items = {item.session: item for item in await call.hear(3)}
        assert items[1].response.opened.first.committed_length == len(PROMPT) + 1
        assert isinstance(from_end(items[2].end), InvalidArgumentError)
        assert from_end(items[3].end).reason == "ROUND_BEFORE_OPEN"
        await call.say(Item(session=1, request=plain_round(len(PROMPT))))
        error = await call.end_of(1)
        assert isinstance(error, FailedPreconditionError)
        await assert_free(verifier)
        # A number may be given again; what is said to nobody is not heard.
        await call.say(Item(session=9, request=plain_round(1)), Item(session=9, change=CANCEL))
        await call.say(Item(session=2, change=BEGIN, request=opening()))
        assert (await call.hear(1))[0].session == 2


async def test_a_cancelled_session_is_free_at_once(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        await call.say(Item(session=1, change=BEGIN, request=opening()), Item(session=2, change=BEGIN))
        await call.say(Item(session=1, change=CANCEL), Item(session=2, change=CANCEL))
        heard: list[int] = []
        while len(heard) < 2:
            heard += [item.session for item in await call.hear(1) if item.end.code == 1]
        assert sorted(heard) == [1, 2]
        await assert_free(verifier)


async def test_a_number_that_a_session_has_ends_the_call(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        await call.say(*[Item(session=1, change=BEGIN, request=opening())] * 2)
        await call.hear(5)
        error = await call.error()
        assert isinstance(error, InvalidArgumentError)
        assert error.reason == "SESSION_NUMBER_TAKEN"
        await assert_free(verifier)


async def test_a_call_that_breaks_takes_its_sessions_along(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        await call.say(*(Item(session=number, change=BEGIN, request=opening()) for number in (1, 2)))
        await call.hear(2)
    await assert_free(verifier)


async def test_the_calls_end_ends_its_sessions_in_order(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        await call.say(*(Item(session=number, change=BEGIN, request=opening()) for number in (1, 2)))
        await call.call.done_writing()
        items = await call.hear(10)
        assert [item.session for item in items if item.HasField("response")] == [1, 2]
        assert [item.end.code for item in items if item.HasField("end")] == [0, 0]
        assert await call.call.code() is grpc.StatusCode.OK
    await assert_free(verifier)


async def test_a_session_has_the_time_it_was_given(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        await call.say(Item(session=1, change=BEGIN, request=opening(), timeout_ms=300))
        assert isinstance(await call.end_of(1), DeadlineExceededError)
        await assert_free(verifier)


async def test_sessions_that_say_nothing_are_limited_too(verifier: VerifierServer) -> None:
    async with shared_call(verifier.host.address) as call:
        for first in range(0, 1000, 100):
            await call.say(*(Item(session=number, change=BEGIN) for number in range(first, first + 100)))
        error = await call.end_of(999)
        assert isinstance(error, ResourceExhaustedError)
        assert error.reason == "NO_SESSION_SLOT"
        assert error.retry_after_s


class Servicer(verifier_pb2_grpc.VerifierServiceServicer):  # type: ignore[misc]
    """Serves sessions as a test says."""

    def __init__(self, serve: Callable[[Any, Any], Any], calls: OpenCalls) -> None:
        self._serve, self._calls = serve, calls
        self.num_calls = 0

    async def VerifyMany(self, requests: Any, context: Any) -> None:  # noqa: N802
        self.num_calls += 1
        await serve_many(self._serve, requests, context, verifier_pb2.VerifyManyResponse, calls=self._calls)


async def answer_all(requests: Any, context: Any) -> None:
    """Answer every request with its base length."""
    async for request in requests:
        result = verifier_pb2.VerifyResult(committed_length=request.round.base_committed_length)
        await context.write(verifier_pb2.VerifyResponse(result=result))


@asynccontextmanager
async def serving(
    serve: Callable[[Any, Any], Any] = answer_all,
) -> AsyncIterator[tuple[ServiceHost, Servicer, SharedCalls]]:
    """Run a server whose sessions are served so, and yield the calls of a client too."""
    calls = OpenCalls()
    servicer = Servicer(serve, calls)
    host = ServiceHost(
        "any",
        lambda server: verifier_pb2_grpc.add_VerifierServiceServicer_to_server(servicer, server),
        "127.0.0.1:0",
        calls=calls,
    )
    await host.start()
    async with aio_channel(host.address) as channel:
        client = SharedCalls(VERIFYING, lambda: channel, "Verifier x")
        yield host, servicer, client
        await client.close()
    await host.stop(grace_s=0)


async def echo(session: Any, number: int) -> None:
    response, elapsed_ns = await session.exchange(plain_round(number))
    assert response.result.committed_length == number
    assert elapsed_ns > 0


async def test_a_clients_sessions_share_a_call() -> None:
    async with serving() as (_, servicer, client):
        sessions = [client.begin(60) for _ in range(20)]
        for number in range(1, 4):
            await asyncio.gather(*(echo(session, number) for session in sessions))
        assert servicer.num_calls == 1
        await asyncio.gather(*(session.close() for session in sessions))
        with pytest.raises(UnavailableError):
            await sessions[0].exchange(plain_round(1))


async def test_a_new_channel_gets_a_call_of_its_own_and_the_old_one_ends() -> None:
    async with (
        serving() as (host, servicer, _),
        aio_channel(host.address) as first,
        aio_channel(host.address) as second,
    ):
        channels = [first]
        client = SharedCalls(VERIFYING, lambda: channels[-1], "Verifier x")
        old = client.begin(60)
        await echo(old, 1)
        channels.append(second)
        new = client.begin(60)
        await echo(new, 2)
        await echo(old, 3)
        assert servicer.num_calls == 2
        assert len(client._calls) == 2
        await old.close()
        await until(lambda: len(client._calls) == 1)
        await echo(new, 4)
        await client.close()


async def test_what_is_too_large_fails_its_session_alone() -> None:
    async with serving() as (_, servicer, client):
        large, small = client.begin(60), client.begin(60)
        await echo(small, 1)
        with pytest.raises(ResourceExhaustedError) as caught:
            await large.exchange(Request(traceparent="x" * (MAX_ITEM_BYTES + 1)))
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        await large.close()
        await echo(small, 2)
        assert servicer.num_calls == 1


async def test_an_answer_that_is_too_large_ends_its_session_alone() -> None:
    async def serve(requests: Any, context: Any) -> None:
        async for request in requests:
            if request.round.base_committed_length == 13:
                opened = verifier_pb2.VerifyOpened(target_state_refusal="x" * (MAX_ITEM_BYTES + 1))
                await context.write(verifier_pb2.VerifyResponse(opened=opened))
            result = verifier_pb2.VerifyResult(committed_length=request.round.base_committed_length)
            await context.write(verifier_pb2.VerifyResponse(result=result))

    async with serving(serve) as (_, servicer, client):
        large, small = client.begin(60), client.begin(60)
        with pytest.raises(ResourceExhaustedError, match="at most"):
            await large.exchange(plain_round(13))
        await echo(small, 2)
        assert servicer.num_calls == 1


async def test_what_nobody_asked_for_ends_the_call() -> None:
    async def serve(requests: Any, context: Any) -> None:
        async for _ in requests:
            for _ in range(3):
                await context.write(verifier_pb2.VerifyResponse())

    async with serving(serve) as (_, servicer, client):
        session = client.begin(60)
        await session.exchange(plain_round(1))
        with pytest.raises(InternalError, match="nobody asked for"):
            await session.exchange(plain_round(2))
        await client.begin(60).exchange(plain_round(1))
        assert servicer.num_calls == 2


async def test_whoever_stops_waiting_for_an_answer_ends_the_session() -> None:
    ended = asyncio.Event()

    async def serve(requests: Any, context: Any) -> None:
        async for request in requests:
            if request.round.base_committed_length == 13:
                try:
                    await asyncio.Event().wait()
                finally:
                    await context.write(verifier_pb2.VerifyResponse())
                    ended.set()
            result = verifier_pb2.VerifyResult(committed_length=request.round.base_committed_length)
            await context.write(verifier_pb2.VerifyResponse(result=result))

    async with serving(serve) as (_, servicer, client):
        slow, other = client.begin(60), client.begin(60)
        await echo(other, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await slow.exchange(plain_round(13))
        async with asyncio.timeout(20):
            await ended.wait()
        await echo(other, 2)
        assert servicer.num_calls == 1  # the answer that came late was due


async def test_a_service_that_hangs_is_given_the_sessions_time() -> None:
    async def serve(requests: Any, context: Any) -> None:
        await asyncio.Event().wait()

    async with serving(serve) as (_, _, client):
        session = client.begin(0.2)
        with pytest.raises(DeadlineExceededError):
            await session.exchange(plain_round(1))
        await session.close()


async def test_a_draining_service_ends_what_runs_and_takes_nothing_new() -> None:
    async with serving() as (host, _, client):
        session = client.begin(60)
        await echo(session, 1)
        stopping = asyncio.ensure_future(host.stop(grace_s=60))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            await client.begin(60).exchange(plain_round(1))
        await echo(session, 2)
        assert not stopping.done()
        await session.close()
        async with asyncio.timeout(20):
            await stopping


async def test_a_service_without_sessions_ends_its_calls_in_order() -> None:
    async with serving() as (host, _, _), shared_call(host.address) as call:
        await call.say(Item(session=1, change=BEGIN, request=plain_round(1)), Item(session=1, change=DONE))
        await call.hear(2)
        async with asyncio.timeout(20):
            await host.stop(grace_s=3600)
        assert await call.call.code() is grpc.StatusCode.OK


async def test_a_defect_ends_its_session_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def serve(requests: Any, context: Any) -> None:
        async for request in requests:
            if request.round.base_committed_length == 13:
                raise KeyError("oh")
            result = verifier_pb2.VerifyResult(committed_length=request.round.base_committed_length)
            await context.write(verifier_pb2.VerifyResponse(result=result))

    async with serving(serve) as (_, _, client):
        one, other = client.begin(60), client.begin(60)
        await echo(other, 1)
        with pytest.raises(InternalError, match="KeyError"):
            await one.exchange(plain_round(13))
        await echo(other, 2)
    assert "request failed" in caplog.text


async def test_a_peer_that_does_not_read_loses_the_call() -> None:
    served = asyncio.Event()

    async def serve(requests: Any, context: Any) -> None:
        try:
            async for _ in requests:
                for _ in range(50):
                    opened = verifier_pb2.VerifyOpened(target_state_refusal="x" * 1_000_000)
                    await context.write(verifier_pb2.VerifyResponse(opened=opened))
        finally:
            served.set()

    class Deaf(Servicer):
        async def VerifyMany(self, requests: Any, context: Any) -> None:  # noqa: N802
            await serve_many(serve, requests, context, verifier_pb2.VerifyManyResponse, write_timeout_s=0.5)

    calls = OpenCalls()
    host = ServiceHost(
        "any",
        lambda server: verifier_pb2_grpc.add_VerifierServiceServicer_to_server(Deaf(serve, calls), server),
        "127.0.0.1:0",
    )
    await host.start()
    async with shared_call(host.address) as call:
        await call.say(Item(session=1, change=BEGIN, request=plain_round(1)))
        async with asyncio.timeout(30):
            await served.wait()
        await call.hear(100)
        assert isinstance(await call.error(), DeadlineExceededError)
    await host.stop(grace_s=0)


async def test_a_session_that_is_sent_too_much_ahead_ends_alone() -> None:
    async def serve(requests: Any, context: Any) -> None:
        async for request in requests:
            if request.round.base_committed_length == 13:
                await asyncio.Event().wait()
            await context.write(verifier_pb2.VerifyResponse())

    async with serving(serve) as (host, _, _), shared_call(host.address) as call:
        await call.say(Item(session=1, change=BEGIN, request=plain_round(13)))
        await call.say(*[Item(session=1, request=plain_round(13))] * 4, Item(session=1, change=DONE))
        error = await call.end_of(1)
        assert isinstance(error, ResourceExhaustedError)
        assert error.reason == "TOO_FAR_AHEAD"
        await call.say(Item(session=2, change=BEGIN, request=plain_round(1)))
        assert (await call.hear(1))[0].session == 2


class Panic(BaseException):
    """What native libraries raise when they panic."""


async def test_a_panic_ends_its_session() -> None:
    async def serve(requests: Any, context: Any) -> None:
        await anext(requests)
        raise Panic("oh")

    async with serving(serve) as (_, _, client):
        async with asyncio.timeout(20):
            with pytest.raises(InternalError, match="Panic"):
                await client.begin(60).exchange(plain_round(1))


@pytest.mark.parametrize(
    "answer",
    [
        verifier_pb2.VerifyManyResponse.FromString(b"\xfa\x3f\x01x"),
        verifier_pb2.VerifyManyResponse(items=[verifier_pb2.VerifyManyResponse.Item(session=1)]),
        verifier_pb2.VerifyManyResponse(
            items=[verifier_pb2.VerifyManyResponse.Item(session=99, end=common_pb2.SessionEnd())]
        ),
    ],
    ids=["a field that nobody knows", "nothing of a session", "the end of no session"],
)
async def test_what_says_nothing_ends_the_call_as_well(answer: verifier_pb2.VerifyManyResponse) -> None:
    class Talker(verifier_pb2_grpc.VerifierServiceServicer):  # type: ignore[misc]
        async def VerifyMany(self, requests: Any, context: Any) -> None:  # noqa: N802
            await anext(aiter(requests))
            await context.write(answer)
            await asyncio.Event().wait()

    host = ServiceHost(
        "any",
        lambda server: verifier_pb2_grpc.add_VerifierServiceServicer_to_server(Talker(), server),
        "127.0.0.1:0",
    )
    await host.start()
    async with aio_channel(host.address) as channel:
        client = SharedCalls(VERIFYING, lambda: channel, "Verifier x")
        async with asyncio.timeout(20):
            with pytest.raises(InternalError, match="nobody asked for"):
                await client.begin(60).exchange(plain_round(1))
        await client.close()
    await host.stop(grace_s=0)


async def test_calls_that_are_closed_at_once_end_their_sessions() -> None:
    async with serving() as (_, _, client):
        session = client.begin(60)
        asking = asyncio.ensure_future(session.exchange(plain_round(1)))
        await client.close()
        async with asyncio.timeout(20):
            with pytest.raises(UnavailableError):
                await asking
        assert not client._calls

"""HTTP clients that send too much or too little, read slowly, or go: nothing waits or stays behind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from gateway.config import GatewayConfig
from gateway.http.answers import Answers
from gateway.http.bodies import Bodies
from gateway.http.events import EventStream
from gateway.http.requests import CompletionRequest
from gateway.http.server import HttpFront
from specdec.client.generation import GenerateOptions
from specdec.client.wire import build_request
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.v1 import gateway_pb2
from tests.http_front import CHAT, COMPLETIONS, Peer, Reply, ask, connected, request_bytes
from tests.integration.gated_drafter import Gate, eventually, gated_system
from tests.raw_streams import until
from tests.refusals import PROMPT, shared
from tests.systems import System, is_idle, running_system

MAX_PROMPT_BYTES = 2**14
ASKED: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
GATED = {**ASKED, "method": "gated", "draft_depth": 2}
LONG: dict[str, Any] = {**ASKED, "max_tokens": 200, "logprobs": 20, "stream": True, "method": "none"}
"""An answer that is longer than what small buffers hold."""
LETTERS = {"allowed_token_ids": [*range(64, 70)]}
"""The only tokens: each is a whole character, which is sent at once."""


def front_of(system: System) -> HttpFront:
    assert system.gateway.http
    return system.gateway.http


async def is_clean(system: System) -> bool:
    generations = system.gateway.generations
    return await is_idle(system) and (generations.num_requests, generations.num_waiting) == (0, 0)


async def assert_clean(system: System) -> None:
    """Check that nobody holds anything, and that a good request is answered."""
    await eventually(lambda: is_clean(system))
    reply = await ask(front_of(system).address, COMPLETIONS, ASKED)
    assert reply.json["usage"]["completion_tokens"] == 6


@asynccontextmanager
async def http_system(model: Path, **options: Any) -> AsyncIterator[System]:
    """Run all three services and the HTTP interface."""
    options = {"http_listen": "127.0.0.1:0", **options}
    async with running_system(model, "ngram", gateway_options=options) as system:
        yield system


@asynccontextmanager
async def gated(model: Path, **options: Any) -> AsyncIterator[tuple[System, Gate]]:
    """Run the same with a drafter that holds requests in mid-stream."""
    gateway_options = {"http_listen": "127.0.0.1:0", **options.pop("gateway_options", {})}
    async with gated_system(model, gateway_options=gateway_options, **options) as (system, gate):
        yield system, gate


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tiny_llama: Path) -> AsyncIterator[System]:
    async with http_system(tiny_llama, max_prompt_bytes=MAX_PROMPT_BYTES) as system:
        yield system


async def ends(peer: Peer) -> None:
    async with asyncio.timeout(20):
        assert await peer.is_ended()


class Watched(CompletionRequest):
    """A request that says which threads turn it into messages."""

    threads: ClassVar[list[int]] = []

    def prompt_messages(self) -> list[gateway_pb2.GenerateRequest]:
        self.threads.append(threading.get_ident())
        return super().prompt_messages()

    def choice_messages(self, message: gateway_pb2.GenerateRequest) -> list[gateway_pb2.GenerateRequest]:
        self.threads.append(threading.get_ident())
        return super().choice_messages(message)


async def read_by_hand(bodies: Bodies, fields: dict[str, Any]) -> list[gateway_pb2.GenerateRequest]:
    """Return the messages that a body asks for."""

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(fields).encode()}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    _, messages = await bodies.read(Request(scope, receive), Watched)
    return messages


class TestBodies:
    @pytest.mark.parametrize(("temperature", "seeds"), [(0.8, [7, 8, 9]), (0, [7, 7, 7])])
    async def test_a_long_body_becomes_messages_in_another_thread(
        self, temperature: float, seeds: list[int]
    ) -> None:
        bodies = Bodies(GatewayConfig(verifier="127.0.0.1:1"))
        prompt, body = [200] * 30_000, {"temperature": temperature, "seed": 7}
        Watched.threads.clear()
        messages = await read_by_hand(bodies, body | {"prompt": prompt, "n": 3})
        assert len(Watched.threads) == 2, "the prompt is built once, and copied"
        assert threading.get_ident() not in Watched.threads
        sampling = SamplingParams(temperature=temperature)
        assert messages == [
            build_request(prompt, GenerateOptions(sampling=replace(sampling, seed=seed))) for seed in seeds
        ]

    async def test_a_prompt_too_long_is_refused_before_it_is_copied(self) -> None:
        config = GatewayConfig(verifier="127.0.0.1:1", max_prompt_bytes=MAX_PROMPT_BYTES)
        Watched.threads.clear()
        with pytest.raises(HTTPException, match="413"):
            await read_by_hand(Bodies(config), {"prompt": "x" * config.max_message_bytes, "n": 16})
        assert len(Watched.threads) == 1
        assert threading.get_ident() not in Watched.threads

    @shared
    async def test_a_body_too_long_is_refused_and_thrown_away(self, system: System) -> None:
        front = front_of(system)
        most = front.app.bodies.max_bytes
        for size in (most + 1, 3 * most, 5 * most):
            reply = await ask(front.address, COMPLETIONS, b" " * size)
            assert (reply.status, reply.headers["connection"] if size > 4 * most else "") == (
                413,
                "close" if size > 4 * most else "",
            )
            assert str(most) in reply.error["message"]
        await assert_clean(system)

    @shared
    async def test_a_body_of_unknown_size_is_read_no_further(self, system: System) -> None:
        front = front_of(system)
        async with connected(front.address) as peer:
            head = request_bytes(COMPLETIONS, b"", transfer_encoding="chunked", content_length="")
            peer.send(head.replace(b"content-length: \r\n", b""))
            chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            for _ in range(5 * front.app.bodies.max_bytes // 0x10000 + 1):
                peer.send(chunk)
            reply = await peer.reply()
            assert (reply.status, reply.headers["connection"]) == (413, "close")
            await ends(peer)
        await assert_clean(system)

    @shared
    async def test_a_prompt_too_long_is_told_as_over_grpc(self, system: System) -> None:
        reply = await ask(front_of(system).address, COMPLETIONS, {"prompt": "x" * (MAX_PROMPT_BYTES + 1)})
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "prompt_too_long", "prompt")
        token_ids = [200] * 160_000
        reply = await ask(front_of(system).address, COMPLETIONS, json.dumps({"prompt": token_ids}).encode())
        assert reply.status == 413, "as a message it is longer than gRPC takes"

    @shared
    async def test_the_longest_prompt_is_taken_however_it_is_written(self, system: System) -> None:
        turns = [{"role": "robot", "content": "é" * (MAX_PROMPT_BYTES // 2 - 20)}]
        reply = await ask(front_of(system).address, CHAT, {"messages": turns})
        assert "Unknown role" in reply.error["message"], "its size is none to refuse it for"

    @shared
    async def test_a_body_that_does_not_come_is_given_up(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        front = front_of(system)
        monkeypatch.setattr(front.app.bodies, "timeout_s", 0.5)
        async with connected(front.address) as peer:
            peer.send(request_bytes(COMPLETIONS, ASKED)[:-1])
            reply = await peer.reply()
            assert (reply.status, reply.headers["connection"]) == (408, "close")
            assert reply.error["code"] == "request_timeout"
            await ends(peer)
        await until(lambda: front.app.bodies.turns.num_waiting == 0)

    @shared
    async def test_few_bodies_of_a_host_are_received_at_a_time(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        front = front_of(system)
        turns = front.app.bodies.turns
        monkeypatch.setattr(turns, "max_at_a_time", 2)
        body = request_bytes(COMPLETIONS, ASKED)
        async with AsyncExitStack() as stack:
            slow = [await stack.enter_async_context(connected(front.address)) for _ in range(2)]
            for peer in slow:
                peer.send(body[:-1])
            await until(lambda: turns.num_waiting == 2)
            third = await stack.enter_async_context(connected(front.address))
            third.send(body)
            await until(lambda: turns.num_waiting == 3)
            assert (await ask(front.address, "/health")).status == 200
            slow[0].send(body[-1:])
            assert (await slow[0].reply()).status == (await third.reply()).status == 200
        await until(lambda: turns.num_waiting == 0)
        await assert_clean(system)


class TestConnections:
    @shared
    async def test_a_connection_without_a_request_ends(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        front = front_of(system)
        monkeypatch.setattr(front.limits, "idle_s", 0.5)
        async with connected(front.address) as fresh, connected(front.address) as used:
            used.ask("/health")
            assert (await used.reply()).status == 200
            await ends(fresh)
            await ends(used)
        await until(lambda: front.num_connections == 0)

    @shared
    @pytest.mark.parametrize("start", [b"G", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"])
    async def test_a_head_that_does_not_end_ends_the_connection(
        self, system: System, start: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        front = front_of(system)
        monkeypatch.setattr(front.limits, "head_s", 0.5)
        async with connected(front.address) as peer:
            peer.send(start)
            await ends(peer)

    @shared
    @pytest.mark.parametrize(
        "garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\nx" + b"y" * 70_000]
    )
    async def test_what_is_no_request_ends_the_connection(self, system: System, garbage: bytes) -> None:
        async with connected(front_of(system).address) as peer:
            peer.send(garbage + b"\r\n\r\n")
            await ends(peer)
        await assert_clean(system)

    @shared
    async def test_one_more_than_there_may_be_ends_the_idlest(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        front = front_of(system)
        await until(lambda: front.num_connections == 0)
        monkeypatch.setattr(front.limits, "max_connections", 3)
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(connected(front.address)) for _ in range(3)]
            for peer in (peers[1], peers[2], peers[0]):
                peer.ask("/health")
                assert (await peer.reply()).status == 200
            assert (await ask(front.address, "/health")).status == 200
            await ends(peers[1])
            for peer in (peers[0], peers[2]):
                peer.ask("/health")
                assert (await peer.reply()).status == 200

    async def test_where_all_are_in_use_one_more_is_refused(self, tiny_llama: Path) -> None:
        async with gated(tiny_llama, gateway_options={"max_http_connections": 2}) as (system, gate):
            front = front_of(system)
            running = [asyncio.ensure_future(ask(front.address, COMPLETIONS, GATED)) for _ in range(2)]
            await eventually(lambda: system.gateway.generations.num_requests == 2)
            async with connected(front.address) as peer:
                reply = await peer.reply()
                assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
                assert reply.headers["retry-after"] == "1"
                await ends(peer)
            gate.open()
            assert [reply.status for reply in await asyncio.gather(*running)] == [200, 200]
            await assert_clean(system)

    @shared
    async def test_a_connection_that_is_old_ends_with_its_answer(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        front = front_of(system)
        monkeypatch.setattr(front.limits, "max_age_s", 0.0)
        async with connected(front.address) as peer:
            peer.ask(COMPLETIONS, ASKED)
            reply = await peer.reply()
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            await ends(peer)

    @shared
    async def test_requests_that_come_together_are_answered_in_turn(self, system: System) -> None:
        async with connected(front_of(system).address) as peer:
            asked = [request_bytes(COMPLETIONS, ASKED, x_request_id=f"r{number}") for number in range(4)]
            peer.send(b"".join(asked))
            replies = [await peer.reply() for _ in range(4)]
        assert [reply.headers["x-request-id"] for reply in replies] == ["r0", "r1", "r2", "r3"]
        assert {reply.status for reply in replies} == {200}


LATE = [b"\r\n", request_bytes(COMPLETIONS, ASKED)]
"""What a client may send before it has the answer to its request."""


class TestWhatComesDuringAnAnswer:
    @pytest.mark.parametrize("late", LATE, ids=["an empty line", "a request"])
    async def test_it_does_not_hide_that_the_client_goes(self, late: bytes, tiny_llama: Path) -> None:
        async with gated(tiny_llama) as (system, gate):
            async with connected(front_of(system).address) as peer:
                peer.ask(COMPLETIONS, GATED)
                await gate.reached()
                peer.send(late)
                peer.writer.close()
                await eventually(lambda: system.gateway.generations.num_requests == 0)
            gate.open()
            await assert_clean(system)

    @pytest.mark.parametrize("late", LATE, ids=["an empty line", "a request"])
    async def test_the_connection_ends_with_the_answer(self, late: bytes, tiny_llama: Path) -> None:
        async with gated(tiny_llama) as (system, gate):
            front = front_of(system)
            async with connected(front.address) as peer:
                peer.ask(COMPLETIONS, GATED)
                await gate.reached()
                (connection,) = front._server._connections()  # type: ignore[union-attr]
                peer.send(late)
                await until(lambda: not connection.cycle.keep_alive)
                gate.open()
                reply = await peer.reply()
                assert (reply.status, reply.headers["connection"]) == (200, "close")
                await ends(peer)
            await assert_clean(system)


@contextmanager
def deaf(address: str, body: object = LONG) -> Iterator[None]:
    """Ask for an answer, and read nothing of it."""
    host, _, port = address.rpartition(":")
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect((host, int(port)))
        peer.sendall(request_bytes(COMPLETIONS, body))
        yield


class TestReaders:
    @pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
    async def test_a_client_that_goes_ends_its_request(
        self, fields: dict[str, Any], tiny_llama: Path
    ) -> None:
        async with gated(tiny_llama, gateway_options={"draft_timeout_s": 2.0}) as (system, gate):
            front = front_of(system)
            async with connected(front.address) as peer:
                peer.ask(COMPLETIONS, GATED | fields)
                await gate.reached()
                assert system.gateway.generations.num_requests == fields.get("n", 1)
            await eventually(lambda: system.gateway.generations.num_requests == 0)
            gate.open()
            await assert_clean(system)

    async def test_a_client_that_goes_in_the_queue_leaves_it(self, tiny_llama: Path) -> None:
        async with gated(tiny_llama, gateway_options={"max_requests": 1}) as (system, gate):
            front, generations = front_of(system), system.gateway.generations
            running = asyncio.ensure_future(ask(front.address, COMPLETIONS, GATED))
            await gate.reached()
            async with connected(front.address) as peer:
                peer.ask(COMPLETIONS, ASKED | {"stream": True})
                await eventually(lambda: generations.num_waiting == 1)
            await eventually(lambda: generations.num_waiting == 0)
            gate.open()
            assert (await running).status == 200
            await assert_clean(system)

    async def test_who_does_not_read_holds_no_verifier_and_not_for_ever(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.http.server._SEND_BUFFER_BYTES", 4096)
        async with http_system(tiny_llama) as system:
            front, generations = front_of(system), system.gateway.generations
            verifier = system.verifier.servicer.verifier
            assert verifier
            with deaf(front.address):
                await eventually(lambda: verifier.num_sessions > 0)
                await until(lambda: verifier.num_sessions == 0, timeout_s=60)
                assert generations.num_requests > 0, "its answer waits to be read"
            await assert_clean(system)

            front.edge.write_timeout_s = 0.5
            with deaf(front.address):
                await eventually(lambda: generations.num_requests > 0)
                await until(lambda: generations.num_requests == 0, timeout_s=60)
                await until(lambda: front.num_connections == 0)
            await assert_clean(system)

    async def test_an_answer_whose_end_is_not_read_ends_with_its_connection(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.http.server._SEND_BUFFER_BYTES", 4096)
        async with http_system(tiny_llama) as system:
            front = front_of(system)
            front.limits.unread_s = front.limits.closing_s = 0.5
            with deaf(front.address, LONG | {"max_tokens": 30}):
                await eventually(lambda: front.num_connections == 1)
                await until(lambda: front.num_connections == 0)
            await assert_clean(system)

    @shared
    async def test_who_reads_slowly_gets_it_all(self, system: System) -> None:
        async with connected(front_of(system).address) as peer:
            peer.ask(COMPLETIONS, LONG)
            head = await peer.reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head
            chunks = []
            async for chunk in peer.chunks():
                chunks.append(chunk)
                await asyncio.sleep(0.001)
        events = Reply(200, {"content-type": "text/event-stream"}, b"".join(chunks)).events
        told = [len(event["choices"][0]["logprobs"]["tokens"]) for event in events[:-1]]
        assert sum(told) == 200


class TestTimes:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_request_has_so_much_time_and_no_more(self, stream: bool, tiny_llama: Path) -> None:
        options = {"max_request_s": 1.0, "draft_timeout_s": 20.0}
        async with gated(tiny_llama, gateway_options=options) as (system, _):
            reply = await ask(front_of(system).address, COMPLETIONS, GATED | LETTERS | {"stream": stream})
            if stream:
                assert reply.status == 200, "the first token was there"
                error = reply.last_error
            else:
                assert (reply.status, reply.headers["x-should-retry"]) == (504, "false")
                error = reply.error
            assert (error["type"], error["code"]) == ("server_error", "request_too_long")
            await eventually(lambda: system.gateway.generations.num_requests == 0)

    async def test_who_waits_too_long_is_told(self, tiny_llama: Path) -> None:
        async with gated(tiny_llama, gateway_options={"max_requests": 1, "max_wait_s": 0.3}) as (
            system,
            gate,
        ):
            front = front_of(system)
            running = asyncio.ensure_future(ask(front.address, COMPLETIONS, GATED))
            await gate.reached()
            reply = await ask(front.address, COMPLETIONS, ASKED | {"stream": True})
            assert (reply.status, reply.error["code"]) == (504, "waited_too_long")
            gate.open()
            assert (await running).status == 200
            await assert_clean(system)

    async def test_a_full_queue_says_when_to_come_back(self, tiny_llama: Path) -> None:
        async with gated(tiny_llama, gateway_options={"max_requests": 1, "max_waiting": 0}) as (system, gate):
            front = front_of(system)
            running = asyncio.ensure_future(ask(front.address, COMPLETIONS, GATED))
            await gate.reached()
            reply = await ask(front.address, COMPLETIONS, ASKED)
            assert (reply.status, reply.error["type"]) == (429, "rate_limit_error")
            assert reply.error["code"] == "too_many_requests"
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            gate.open()
            assert (await running).status == 200
            await assert_clean(system)


class TestDrain:
    async def test_what_runs_ends_and_what_waits_is_sent_away(self, tiny_llama: Path) -> None:
        async with gated(tiny_llama, gateway_options={"max_requests": 1}) as (system, gate):
            front, generations = front_of(system), system.gateway.generations
            async with connected(front.address) as idle:
                running = asyncio.ensure_future(ask(front.address, COMPLETIONS, GATED))
                await gate.reached()
                waiting = asyncio.ensure_future(ask(front.address, COMPLETIONS, ASKED))
                await eventually(lambda: generations.num_waiting == 1)
                stopping = asyncio.ensure_future(system.gateway.host.stop(grace_s=20))
                reply = await waiting
                assert (reply.status, reply.error["code"]) == (503, "draining")
                assert reply.headers["retry-after"] == "1"
                await ends(idle)
                with pytest.raises(OSError, match="Connect"):
                    await ask(front.address, "/health")
                assert not stopping.done()
                gate.open()
                answer = await running
                assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 6)
                await stopping
                assert front.num_connections == 0

    @pytest.mark.parametrize("stream", [False, True])
    async def test_what_still_runs_after_the_grace_is_cut_off(self, stream: bool, tiny_llama: Path) -> None:
        async with gated(tiny_llama) as (system, gate):
            front = front_of(system)
            async with connected(front.address) as peer:
                peer.ask(COMPLETIONS, GATED | LETTERS | {"stream": stream})
                await gate.reached()
                head = await peer.head() if stream else None
                await system.gateway.host.stop(grace_s=0.2)
                reply = await peer.reply(head)
                assert reply.status == (200 if stream else 503)
                error = reply.last_error if stream else reply.error
                assert (error["type"], error["code"]) == ("server_error", "draining")
                await ends(peer)
            assert system.gateway.generations.num_requests == 0
            gate.open()


async def test_a_defect_in_mid_stream_is_told(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("secret")

    async with gated(tiny_llama) as (system, gate):
        async with connected(front_of(system).address) as peer:
            peer.ask(COMPLETIONS, GATED | LETTERS | {"stream": True})
            await gate.reached()
            head = await peer.head()
            monkeypatch.setattr(Answers, "last", fail)
            gate.open()
            error = (await peer.reply(head)).last_error
            assert (error["type"], error["code"]) == ("server_error", "internal")
            assert "secret" not in error["message"]
            assert "request failed" in caplog.messages
        await assert_clean(system)


async def test_events_have_no_character_that_ends_a_line_for_somebody() -> None:
    text = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1d\x1ee\r\n"
    sent = bytearray()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.extend(message.get("body", b""))

    stream = EventStream(send, padding=0)
    await stream.events([{"text": text}])
    await stream.fail(InvalidArgumentError(text))
    event, empty, error, end = sent.decode().splitlines()
    assert (empty, end) == ("", "")
    assert json.loads(event.removeprefix("data: ")) == {"text": text}
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == text


class TestPadding:
    @pytest.mark.parametrize("multiple", [64, 1024])
    async def test_what_is_sent_at_a_time_has_a_size_that_tells_nothing(
        self, multiple: int, tiny_llama: Path
    ) -> None:
        body = ASKED | {"max_tokens": 24, "stream": True, "stream_options": {"include_usage": True}}
        async with http_system(tiny_llama, stream_padding=multiple) as system:
            address = front_of(system).address
            async with connected(address) as peer:
                peer.ask(COMPLETIONS, body)
                await peer.reader.readuntil(b"\r\n\r\n")
                chunks = [chunk async for chunk in peer.chunks()]
            assert {len(chunk) % multiple for chunk in chunks} == {0}
            if multiple == 1024:
                assert {len(chunk) for chunk in chunks[:-2]} == {1024}, "the last two have the statistics"
            events = Reply(200, {"content-type": "text/event-stream"}, b"".join(chunks)).events
            reply = await ask(address, COMPLETIONS, {**body, "stream": False, "stream_options": None})
            assert len(reply.body) % multiple == 0
            text = reply.json["choices"][0]["text"]
            assert "".join(event["choices"][0]["text"] for event in events[:-1]) == text

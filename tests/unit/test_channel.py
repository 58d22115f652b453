"""Channels: what their times mean, what becomes of calls when certificates change, what is left of them."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.config import GatewayConfig
from specdec.contract.errors import InvalidArgumentError
from specdec.transport import channel
from specdec.transport.channel import (
    SERVICE_KEEPALIVE,
    ServiceChannel,
    client_options,
    parse_uris,
)
from specdec.transport.server import ConnectionLimits, server_options
from specdec.transport.tls import OutgoingTls, PemFiles, server_credentials
from specdec.v1 import gateway_pb2, gateway_pb2_grpc
from tests.certificates import Authority, Folder, replace
from tests.leftovers import nothing_left_behind
from tests.raw_streams import until
from tests.unit.scripted_gateway import (
    Responses,
    ScriptedGateway,
    chunk,
    finished,
    hang,
    serving,
    started,
    token,
)


def test_addresses_may_be_sockets_whose_paths_the_kernel_takes() -> None:
    longest = f"unix:/{'x' * 106}"
    assert parse_uris(f"{longest}, host:1") == (longest, "host:1")
    with pytest.raises(InvalidArgumentError, match="at most 107 bytes"):
        parse_uris(f"host:1,{longest}x")
    with pytest.raises(InvalidArgumentError, match="has 108;"):
        parse_uris(f"unix:///{'x' * 105}é")


@pytest.mark.parametrize(
    "options",
    [
        client_options("dns:///host:1"),
        client_options("dns:///host:1", keepalive=SERVICE_KEEPALIVE),
        server_options(),
        server_options(
            ConnectionLimits(idle_s=GatewayConfig().connection_idle_s, max_age_s=300.0, age_grace_s=900.0)
        ),
    ],
)
def test_times_are_in_milliseconds(options: list[tuple[str, Any]]) -> None:
    """Each time lies where an operator would expect it; a second taken for a millisecond does not."""
    right_s = {
        "grpc.keepalive_time_ms": (2, 60),
        "grpc.keepalive_timeout_ms": (2, 30),
        "grpc.http2.ping_timeout_ms": (2, 30),
        "grpc.initial_reconnect_backoff_ms": (0.05, 1),
        "grpc.max_reconnect_backoff_ms": (1, 5),
        "grpc.max_connection_age_ms": (60, 7200),
        "grpc.max_connection_age_grace_ms": (60, 3_000_000),
        "grpc.dns_min_time_between_resolutions_ms": (1, 10),
        "grpc.max_connection_idle_ms": (60, 1800),
        "grpc.server_handshake_timeout_ms": (5, 60),
    }
    times = {name: value / 1000 for name, value in options if name.endswith("_ms")}
    assert times
    for name, value_s in times.items():
        lowest_s, highest_s = right_s[name]
        assert lowest_s <= value_s <= highest_s, name


@pytest.mark.parametrize(
    ("uri", "tries_again"), [("dns:///host:1", True), ("host:1", False), ("unix:/x", False)]
)
def test_only_a_name_may_have_other_servers_to_try(uri: str, tries_again: bool) -> None:
    config = json.loads(dict(client_options(uri))["grpc.service_config"])
    assert ("methodConfig" in config) == tries_again


def test_an_age_without_end_is_one_for_grpc() -> None:
    options = dict(server_options(ConnectionLimits(max_age_s=1e9, age_grace_s=1e-9)))
    assert options["grpc.max_connection_age_ms"] == 2**31 - 1
    assert options["grpc.max_connection_age_grace_ms"] == 1


def generate(connection: grpc.aio.Channel) -> Any:
    return gateway_pb2_grpc.GatewayServiceStub(connection).Generate(gateway_pb2.GenerateRequest(text="Hi"))


async def test_closing_ends_calls_and_connections() -> None:
    with serving() as gateway:
        gateway.script = hang
        async with nothing_left_behind():
            connection = ServiceChannel(gateway.address)
            call = generate(connection.current())
            assert (await call.read()).HasField("started")
            await connection.close()
            assert call.cancelled()
            del call  # a call holds its connection
        assert await asyncio.to_thread(gateway.ended.wait, 10)


async def test_calls_go_on_when_certificates_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_for_the_end(gateway: ScriptedGateway, *_: object) -> Responses:
        yield started()
        assert gateway.ended.wait(20)
        yield chunk(token(11, "Hello"))
        yield finished()

    monkeypatch.setattr(channel, "_RETIRE_AFTER_S", 0.0)
    authority = Authority()
    files = Folder(tmp_path).write(authority.issue(), authority).path
    credentials = server_credentials(PemFiles(None, files / "key.pem", files / "cert.pem"))
    with serving(credentials) as gateway:
        gateway.script = wait_for_the_end
        async with nothing_left_behind():
            connection = ServiceChannel(gateway.address, tls=OutgoingTls(PemFiles(files / "ca.pem")))
            old = connection.current()
            under_way = generate(old)
            await under_way.read()
            replace(files / "ca.pem", authority.pem + Authority("another").pem)
            assert connection.current() is not old
            assert connection.current() is connection.current()
            await until(partial(is_closing, old))
            gateway.ended.set()
            assert (await under_way.read()).HasField("chunk")
            assert (await under_way.read()).HasField("finished")
            assert [message async for message in generate(connection.current())][-1].HasField("finished")
            await connection.close()
            del old, under_way  # a call holds its connection


def is_closing(connection: grpc.aio.Channel) -> bool:
    """Return whether the channel takes no more calls."""
    try:
        generate(connection).cancel()
    except grpc.aio.UsageError:
        return True
    return False

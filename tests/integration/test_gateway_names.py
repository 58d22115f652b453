"""Clients that find gateways by a name hear of new ones, and none of their requests fails as others go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from gateway.server import GatewayServer
from specdec.client import AsyncClient, Client, GenerateOptions
from specdec.contract.errors import UnavailableError
from specdec.local.processes import free_ports
from tests.integration.gated_drafter import WAIT_S, eventually
from tests.name_server import NameServer, running_name_server
from tests.systems import running_gateway, running_verifier

OPTIONS = GenerateOptions(method="none", max_new_tokens=3, ignore_eos=True)
NAME = "gateways.test"
IPS = ("127.0.0.1", "127.0.0.2")


class Gateways:
    """Gateways of one name, which share a port, on addresses of this host."""

    def __init__(self, model: Path, verifier: str, names: NameServer) -> None:
        (self.port,) = free_ports(1)
        self.names = names
        self.uri = names.uri(NAME, self.port)
        self._model, self._verifier = model, verifier

    @asynccontextmanager
    async def running(self, ip: str, *, max_connection_age_s: float = 600.0) -> AsyncIterator[GatewayServer]:
        """Run the gateway of an address."""
        async with running_gateway(
            self._model,
            verifier=self._verifier,
            listen=f"{ip}:{self.port}",
            max_connection_age_s=max_connection_age_s,
        ) as (_, server):
            yield server


@asynccontextmanager
async def gateways_of(model: Path) -> AsyncIterator[Gateways]:
    async with running_verifier(model) as (verifier_at, _), running_name_server(IPS[0]) as names:
        yield Gateways(model, verifier_at, names)


def num_sessions(gateway: GatewayServer) -> int:
    assert gateway.generations.backends
    return gateway.generations.backends.verifiers.replicas[0].num_sessions


async def test_a_client_that_stays_connected_hears_of_a_new_gateway(tiny_llama: Path) -> None:
    async with (
        gateways_of(tiny_llama) as gateways,
        gateways.running(IPS[0], max_connection_age_s=1.0),
        AsyncClient(gateways.uri, timeout_s=60) as client,
    ):
        await client.generate([5, 6, 7], OPTIONS)
        async with gateways.running(IPS[1]) as coming:
            gateways.names.addresses = list(IPS)
            long = GenerateOptions(method="none", max_new_tokens=100, ignore_eos=True)

            async def has_work() -> bool:
                async with client.stream([5, 6, 7], long) as stream:
                    await anext(stream)
                    return num_sessions(coming) > 0

            await eventually(has_work)


async def test_an_answer_outlives_the_connection_that_is_closed_to_new_calls(tiny_llama: Path) -> None:
    async with (
        gateways_of(tiny_llama) as gateways,
        gateways.running(IPS[0], max_connection_age_s=0.3),
        AsyncClient(gateways.uri, timeout_s=60) as client,
        client.stream([5, 6, 7], GenerateOptions(max_new_tokens=400, ignore_eos=True)) as stream,
    ):
        async for _ in stream:
            await asyncio.sleep(0.005)
        assert len(stream.result.token_ids) == 400


async def test_no_request_fails_while_gateways_come_and_go(tiny_llama: Path) -> None:
    """The name tells of a new gateway when the old one ends, which is the only one that clients know."""
    num_answers, is_over = 0, False

    async def ask(client: AsyncClient) -> None:
        nonlocal num_answers
        while not is_over:
            assert (await client.generate([5, 6, 7], OPTIONS)).usage.output_tokens == 3
            num_answers += 1

    async with gateways_of(tiny_llama) as gateways, AsyncExitStack() as stack:
        server = await stack.enter_async_context(gateways.running(IPS[0]))
        clients = [await stack.enter_async_context(AsyncClient(gateways.uri, timeout_s=60)) for _ in range(4)]
        asking = [asyncio.create_task(ask(client)) for client in clients]
        try:
            for ip in (*IPS[::-1], IPS[1]):
                so_far = num_answers
                await eventually(lambda so_far=so_far: num_answers > so_far + 20)  # type: ignore[misc]
                ending = server
                server = await stack.enter_async_context(gateways.running(ip))
                gateways.names.addresses = [ip]
                await ending.host.stop(WAIT_S)
        finally:
            is_over = True
            await asyncio.gather(*asking)


@pytest.mark.parametrize("target", ["a name", "an address"])
async def test_nobody_behind_a_name_is_waited_for_a_little(target: str, tiny_llama: Path) -> None:
    async with running_name_server(IPS[0]) as names:
        (port,) = free_ports(1)
        uri = names.uri(NAME, port) if target == "a name" else f"{IPS[0]}:{port}"

        def ask() -> None:
            with Client(uri, timeout_s=60) as client, pytest.raises(UnavailableError) as raised:
                client.generate([5, 6, 7], OPTIONS)
            assert raised.value.reason == "GATEWAY_UNREACHABLE"

        async with asyncio.timeout(WAIT_S):
            await asyncio.to_thread(ask)

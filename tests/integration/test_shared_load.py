"""Gateways that share their replicas: each sees what the others' sessions take, and goes elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from gateway.replicas import replica
from gateway.server import GatewayServer
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.load import Load
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import WAIT_S, Gate, eventually
from tests.integration.test_replicas import EVERY_BYTE, OPTIONS, all_ready, num_rounds
from tests.raw_streams import draft_stream, until, verify_stream
from tests.systems import running_drafter, running_gateway, running_verifier

LOOKUP = GenerateOptions(method="ngram", draft_depth=2, max_new_tokens=6, ignore_eos=True)


class Shared:
    """Two verifiers and two drafters, each with a counter of its rounds, and two gateways over all."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.readers: dict[str, list[InMemoryMetricReader]] = {"verifier": [], "drafter": []}
        self.gateways: list[GatewayServer] = []
        self.clients: list[AsyncClient] = []

    def rounds(self, kind: str) -> list[int]:
        """Return the rounds of each replica so far."""
        return [num_rounds(reader, f"specdec.{kind}.rounds") for reader in self.readers[kind]]

    @asynccontextmanager
    async def held_at_the_first(self) -> AsyncIterator[None]:
        """Hold a request of the first gateway in mid-stream."""
        options = GenerateOptions(method="gated", draft_depth=1, max_new_tokens=6, ignore_eos=True)
        held = asyncio.create_task(self.clients[0].generate([5, 6, 7], options))
        try:
            await self.gate.reached()
            yield
        finally:
            self.gate.open()
            assert (await held).usage.output_tokens == 6

    async def generate_at_the_second(self, prompt: Sequence[int], options: GenerateOptions) -> None:
        """Run a request of the second gateway until it holds nothing more there."""
        await self.clients[1].generate(prompt, options)
        backends = self.gateways[1].generations.backends
        assert backends
        replicas = [*backends.verifiers.replicas, *backends.drafters.replicas]
        await until(lambda: not any(one.num_sessions for one in replicas))

    async def sessions(self, kind: str) -> list[int]:
        """Return the sessions of all gateways on each replica, as the second gateway hears of them."""
        info = await self.clients[1].info()
        replicas = info.verifiers if kind == "verifier" else info.drafters
        return [one.info.num_sessions for one in replicas if one.info]


@asynccontextmanager
async def running_shared(model: Path) -> AsyncIterator[Shared]:
    shared = Shared()
    async with AsyncExitStack() as stack:
        at: dict[str, list[str]] = {"verifier": [], "drafter": []}
        for _ in range(2):
            for kind, readers in shared.readers.items():
                readers.append(InMemoryMetricReader())
                telemetry = make_telemetry(kind, metric_reader=readers[-1])
                server = (
                    running_verifier(model, telemetry=telemetry)
                    if kind == "verifier"
                    else running_drafter("ngram", "gated", telemetry=telemetry, families=shared.gate.families)
                )
                at[kind].append((await stack.enter_async_context(server))[0])
        for _ in range(2):
            addresses = {kind: ",".join(uris) for kind, uris in at.items()}
            started = running_gateway(model, **addresses, draft_timeout_s=WAIT_S)  # type: ignore[arg-type]
            address, gateway = await stack.enter_async_context(started)
            shared.gateways.append(gateway)
            client = AsyncClient(address, timeout_s=60)
            shared.clients.append(await stack.enter_async_context(client))
            await eventually(lambda client=client: all_ready(client))  # type: ignore[misc]
        stack.callback(shared.gate.open)
        yield shared


@pytest.mark.parametrize(("kind", "options"), [("verifier", OPTIONS), ("drafter", LOOKUP)])
async def test_a_gateway_goes_where_another_has_no_session(
    kind: str, options: GenerateOptions, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only this test asks: what is said while a session ends may count it or not.
    monkeypatch.setattr(replica, "LOAD_INTERVAL_S", 3600.0)
    async with running_shared(tiny_llama) as shared, shared.held_at_the_first():

        async def is_heard() -> bool:
            return sorted(await shared.sessions(kind)) == [0, 1]

        await eventually(is_heard)
        idle = (await shared.sessions(kind)).index(0)
        before = shared.rounds(kind)
        for _ in range(8):
            await shared.generate_at_the_second(EVERY_BYTE, options)
        after = shared.rounds(kind)
        assert after[idle] > before[idle]
        assert after[1 - idle] == before[1 - idle]


async def test_idle_replicas_are_asked_without_any_request(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama) as (first_at, _),
        running_verifier(tiny_llama) as (second_at, _),
        running_gateway(tiny_llama, verifier=f"{first_at},{second_at}") as (_, gateway),
        verify_stream(second_at) as elsewhere,
    ):
        assert gateway.generations.backends
        verifiers = gateway.generations.backends.verifiers
        await eventually(lambda: verifiers.num_ready == 2)
        await elsewhere.open([5, 6, 7])
        await eventually(lambda: [one.load.busyness for one in verifiers.replicas] == [0, 1])
        assert {verifiers.pick().uri for _ in range(20)} == {first_at}


async def test_answers_tell_the_load_without_any_question(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "LOAD_INTERVAL_S", 3600.0)
    async with running_shared(tiny_llama) as shared, shared.held_at_the_first():
        before = shared.rounds("verifier")
        for _ in range(8):
            await shared.generate_at_the_second([5, 6], OPTIONS)
        added = [after - earlier for after, earlier in zip(shared.rounds("verifier"), before, strict=True)]
        # The first may go to either. Where it meets the other gateway's session it hears of it.
        assert sorted(added) in ([0, sum(added)], [sum(added) // 8, sum(added) * 7 // 8])


async def test_every_answer_tells_the_load(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama, max_sessions=3) as (verifier_at, server),
        running_drafter("ngram", f"small=causal-lm:{tiny_llama}", max_sessions=5) as (drafter_at, _),
        verify_stream(verifier_at) as verify,
        verify_stream(verifier_at) as other,
        draft_stream(drafter_at) as draft,
    ):
        assert server.servicer.verifier
        capacity = server.servicer.verifier.pool.capacity_tokens
        first = await verify.open([5, 6, 7])
        assert Load.from_proto(first.load) == Load(1, 3, 0, capacity, capacity - 64)
        await other.open([5, 6, 7])
        result = await verify.round()
        assert Load.from_proto(result.load) == Load(2, 3, 0, capacity, capacity - 2 * 64)
        opened = await draft.open("small", [5, 6, 7])
        load = Load.from_proto(opened.load)
        assert (load.num_sessions, load.max_sessions) == (1, 5)
        assert 0 < load.kv_free_tokens < load.kv_capacity_tokens

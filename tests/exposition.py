"""What running services expose: every kind of request is made once, then each service's /metrics is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem
from drafter_service.families import DrafterFactory, DrafterSpec
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import TargetStateSpec
from specdec.service.exporters import make_telemetry
from specdec.service.telemetry import Telemetry
from tests.integration.gated_drafter import eventually_offers
from tests.state_probe import StateProbe
from tests.systems import ANY_PORT, running_drafter, running_gateway, running_verifier
from verifier_service.server import VerifierServer

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
BRIEF = GenerateOptions(max_new_tokens=24, draft_depth=3, ignore_eos=True)
SERVICES = ("gateway", "verifier", "drafter")


class BrokenDrafter(Drafter):
    """Fails whenever it is asked."""

    def __init__(self, name: str) -> None:
        self.traits = DrafterTraits(name, "broken", 8, 2)

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        raise RuntimeError("broken")


def make_broken(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    """Make a drafter of the family "broken"."""
    return BrokenDrafter(spec.name)


@dataclass(frozen=True, slots=True)
class Exposition:
    """Metric families by name, each service's own."""

    families: Mapping[str, Mapping[str, Metric]]

    def labels(self, sample: str, service: str | None = None) -> set[str]:
        """Return the label names of a sample name such as x_bucket, of all services or of the given service.
        The set is empty if there is no such sample.
        """
        return {
            label
            for name, families in self.families.items()
            if service in (None, name)
            for family in families.values()
            for measured in family.samples
            if measured.name == sample
            for label in (*measured.labels, "__name__")
        }


def scrape(telemetry: Telemetry) -> dict[str, Metric]:
    """Return the metric families at a service's endpoint, by name."""
    assert telemetry.prometheus
    with urlopen(f"http://{telemetry.prometheus.address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


async def expose_everything(model: Path, draft_model: Path, shared_dir: Path) -> Exposition:
    """Run real services through all that is counted, and read their endpoints."""
    telemetries = {name: make_telemetry(name, metrics_listen=ANY_PORT) for name in SERVICES}
    families: dict[str, DrafterFactory] = {"broken": make_broken}
    for name in ("probe", "streamed"):
        families |= StateProbe(TargetStateSpec((0, 1), True), name=name).families
    here = {"shared_dir": str(shared_dir)}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        verifiers = [
            await enter(running_verifier(model, telemetry=telemetries["verifier"], **here)) for _ in range(2)
        ]
        noisy = f"noisy=causal-lm:{draft_model}"
        drafters = [
            await enter(
                running_drafter(
                    *names, families=families, telemetry=telemetries["drafter"], target_state=mode, **here
                )
            )
            for mode, names in {
                "handle": ("ngram", noisy, "probe", "broken"),
                "stream": ("streamed",),
            }.items()
        ]
        gateway, _ = await enter(
            running_gateway(
                model,
                verifier=",".join(address for address, _ in verifiers),
                drafter=",".join(address for address, _ in drafters),
                telemetry=telemetries["gateway"],
                failover_wait_s=10.0,
            )
        )
        client = await enter(AsyncClient(gateway, timeout_s=60))
        await eventually_offers(client, "ngram", "noisy", "probe", "broken", "streamed")
        for method in ("none", "noisy", "probe", "streamed", "broken", "ngram+probe", "broken+noisy"):
            await client.generate(PROMPT, replace(BRIEF, method=method))
        with pytest.raises(InvalidArgumentError):
            await client.generate(PROMPT, replace(BRIEF, method="unheard-of"))
        await _preempt_an_answer(client, [server for _, server in verifiers])
        await _lose_a_verifier(client, [server for _, server in verifiers])
        return Exposition({name: scrape(telemetry) for name, telemetry in telemetries.items()})


async def _preempt_an_answer(client: AsyncClient, servers: Sequence[VerifierServer]) -> None:
    """Take all that is free of a verifier's KV while an answer grows there."""
    options = replace(BRIEF, method="none", max_new_tokens=400)
    async with client.stream(PROMPT, options) as stream:
        await anext(aiter(stream))
        verifiers = [server.servicer.verifier for server in servers]
        (pool,) = [verifier.pool for verifier in verifiers if verifier and verifier.num_sessions]
        held = pool.allocate(pool.free_tokens)
        async for _ in stream:
            pass
        assert stream.result.num_failovers == 0
        pool.free(held)


async def _lose_a_verifier(client: AsyncClient, servers: Sequence[VerifierServer]) -> None:
    options = replace(BRIEF, method="ngram", max_new_tokens=200)
    async with client.stream(PROMPT, options) as stream:
        await anext(aiter(stream))
        for server in servers:
            assert server.servicer.verifier
            if server.servicer.verifier.num_sessions:
                await server.host.stop(0)
        async for _ in stream:
            pass
        assert stream.result.num_failovers == 1

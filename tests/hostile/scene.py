"""A gateway between a drafter that lies and services that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.client import AsyncClient, GenerateOptions
from specdec.client.generation import Generation
from tests.hostile.liar import Liar, running_liar
from tests.raw_streams import until
from tests.refusals import PROMPT
from tests.systems import running_gateway
from verifier_service.server import VerifierServer

NUM_TOKENS = 12
DRAFT_TIMEOUT_S = 0.5
BOUND_S = 60.0
"""No request may take longer, whatever its drafter does; an honest one takes less than a second."""


@dataclass(frozen=True)
class Scene:
    """A gateway whose drafters are the liar and an honest one."""

    client: AsyncClient
    gateway: Any
    verifier: VerifierServer
    liar: Liar
    plain_answers: dict[str, Generation]

    async def generate(self, method: str, **options: Any) -> Generation:
        fields = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "draft_depth": 4, **options}
        if method == "none":
            fields |= {"draft_depth": None, "draft_nodes": 0}
        async with asyncio.timeout(BOUND_S):
            return await self.client.generate(PROMPT, GenerateOptions(**({"method": method} | fields)))

    async def plain(self, **options: Any) -> Generation:
        """Return the answer without any drafter, which is the same in every scene."""
        key = repr(options)
        if key not in self.plain_answers:
            self.plain_answers[key] = await self.generate("none", **options)
        return self.plain_answers[key]

    async def assert_clean(self) -> None:
        """Check that nobody holds anything, and that the honest drafter still drafts."""
        verifier, backends = self.verifier.servicer.verifier, self.gateway.generations.backends
        assert verifier is not None
        await until(lambda: verifier.num_sessions == 0, timeout_s=10)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
        assert verifier.export.num_sessions == 0
        await until(lambda: self.liar.num_streams == 0, timeout_s=10)
        replicas = [*backends.verifiers.replicas, *backends.drafters.replicas]
        await until(lambda: all(replica.num_sessions == 0 for replica in replicas), timeout_s=10)
        honest = await self.generate("model")
        assert honest.speculation.num_fallback_rounds == 0
        assert honest.speculation.num_draft_tokens > 0


@dataclass(frozen=True)
class Honest:
    """The services that do not lie."""

    model: Path
    verifier_address: str
    verifier: VerifierServer
    drafter_address: str
    plain_answers: dict[str, Generation] = field(default_factory=dict)


@asynccontextmanager
async def scene_of(liar: Liar, honest: Honest, *, waits: bool = True) -> AsyncIterator[Scene]:
    async with (
        running_liar(liar) as liar_at,
        running_gateway(
            honest.model,
            verifier=honest.verifier_address,
            drafter=f"{liar_at},{honest.drafter_address}",
            draft_timeout_s=DRAFT_TIMEOUT_S,
        ) as (gateway_at, gateway),
        AsyncClient(gateway_at, timeout_s=BOUND_S) as client,
    ):
        backends = gateway.generations.backends
        assert backends is not None
        heard = backends.drafters.replicas
        if waits:
            await until(lambda: all(r.reason != "not serving yet" for r in heard), timeout_s=20)
        await until(lambda: heard[1].is_ready, timeout_s=20)
        yield Scene(client, gateway, honest.verifier, liar, honest.plain_answers)

"""A verifier that lies about its time: figures stay within what was waited for, and requests are answered."""

from __future__ import annotations

from functools import partial
from typing import Any

from specdec.client import AsyncClient, GenerateOptions
from specdec.v1 import verifier_pb2_grpc
from tests.hostile.liar import lying_timings
from tests.hostile.scene import Honest
from tests.integration.test_manners import VERIFIER, serving
from tests.refusals import PROMPT, shared
from tests.systems import running_gateway
from verifier_service.server import VerifierServer


class LyingContext:
    """A call's context that changes the times of what is sent."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, response: Any) -> None:
        result = response.opened.first if response.HasField("opened") else response.result
        result.timings.CopyFrom(lying_timings())
        await self._context.write(response)


class LyingVerifier(verifier_pb2_grpc.VerifierServiceServicer):  # type: ignore[misc]
    """Verifies as it should, and was busy since long before the universe began."""

    def __init__(self, inner: VerifierServer) -> None:
        self._inner = inner.servicer
        self.GetInfo = inner.servicer.GetInfo

    async def Verify(self, requests: Any, context: Any) -> None:  # noqa: N802
        await self._inner.Verify(requests, LyingContext(context))


@shared
async def test_a_verifiers_time_is_no_longer_than_what_was_waited_for(honest: Honest) -> None:
    lying = LyingVerifier(honest.verifier)
    register = partial(verifier_pb2_grpc.add_VerifierServiceServicer_to_server, lying)
    options = GenerateOptions(max_new_tokens=8, ignore_eos=True)
    async with (
        serving(VERIFIER, register) as verifier_at,
        running_gateway(honest.model, verifier=verifier_at, drafter=honest.drafter_address) as (address, _),
        AsyncClient(address, timeout_s=60) as client,
    ):
        answer = await client.generate(PROMPT, options, method="model")
    assert len(answer.token_ids) == 8
    told = answer.speculation
    assert told.verify_ms > 0
    assert told.draft_ms + told.verify_ms + told.transport_ms <= answer.timing.total_ms

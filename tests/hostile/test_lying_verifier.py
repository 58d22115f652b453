"""A verifier that says what it should not: figures stay right, and requests are answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.service.shared_call import serve_many
from specdec.v1 import verifier_pb2, verifier_pb2_grpc
from tests.hostile.liar import lying_timings
from tests.hostile.scene import Honest
from tests.integration.test_manners import VERIFIER, serving
from tests.refusals import PROMPT, shared
from tests.systems import running_gateway
from verifier_service.server import VerifierServer


def change_times(result: verifier_pb2.VerifyResult) -> None:
    result.timings.CopyFrom(lying_timings())


def end_for_a_new_reason(result: verifier_pb2.VerifyResult) -> None:
    if result.finish_reason:
        result.finish_reason = 99  # type: ignore[assignment]


Change = Callable[[verifier_pb2.VerifyResult], None]


class LyingContext:
    """A call's context that changes what is sent."""

    def __init__(self, context: Any, change: Change) -> None:
        self._context, self._change = context, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, response: Any) -> None:
        result = response.opened.first if response.HasField("opened") else response.result
        self._change(result)
        await self._context.write(response)


class LyingVerifier(verifier_pb2_grpc.VerifierServiceServicer):  # type: ignore[misc]
    """Verifies as it should, and says something else of it."""

    def __init__(self, inner: VerifierServer, change: Change) -> None:
        self._inner, self._change = inner.servicer, change
        self.GetInfo = inner.servicer.GetInfo

    async def Verify(self, requests: Any, context: Any) -> None:  # noqa: N802
        await self._inner.Verify(requests, LyingContext(context, self._change))

    async def VerifyMany(self, requests: Any, context: Any) -> None:  # noqa: N802
        await serve_many(self.Verify, requests, context, verifier_pb2.VerifyManyResponse)


async def answer_of(honest: Honest, change: Change) -> Generation:
    lying = LyingVerifier(honest.verifier, change)
    register = partial(verifier_pb2_grpc.add_VerifierServiceServicer_to_server, lying)
    options = GenerateOptions(max_new_tokens=8, ignore_eos=True)
    async with (
        serving(VERIFIER, register) as verifier_at,
        running_gateway(honest.model, verifier=verifier_at, drafter=honest.drafter_address) as (address, _),
        AsyncClient(address, timeout_s=60) as client,
    ):
        answer = await client.generate(PROMPT, options, method="model")
    assert len(answer.token_ids) == 8
    return answer


@shared
async def test_an_answer_that_ends_for_a_reason_of_a_newer_verifier_ends(honest: Honest) -> None:
    assert (await answer_of(honest, end_for_a_new_reason)).finish_reason == "stop_token"


@shared
async def test_a_verifiers_time_is_no_longer_than_what_was_waited_for(honest: Honest) -> None:
    """It was busy since long before the universe began."""
    answer = await answer_of(honest, change_times)
    told = answer.speculation
    assert told.verify_ms > 0
    assert told.draft_ms + told.verify_ms + told.transport_ms <= answer.timing.total_ms

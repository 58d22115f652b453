"""What tests of refusals share: requests, a system with little room, and the proof that nothing was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from specdec.client import GenerateOptions
from specdec.contract.errors import SpecdecError, from_rpc_error
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.transport.channel import aio_channel
from specdec.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc
from tests.raw_streams import until
from tests.systems import System, running_system

CONTEXT = 512
"""Positions of the tiny models."""
POOL_TOKENS = 6 * BLOCK_TOKENS
"""What the small system's KV pool holds: less than the context."""
MAX_SESSIONS = 4
"""Sessions the small system's verifier takes at a time."""
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]

shared = pytest.mark.asyncio(loop_scope="module")
"""For tests that leave the shared system as they found it, which each of them asserts."""


def generate_request(**fields: Any) -> gateway_pb2.GenerateRequest:
    """Return a request that is right except for `fields`."""
    if not fields.keys() & {"text", "chat", "token_ids"}:
        fields["token_ids"] = gateway_pb2.TokenIds(token_ids=PROMPT)
    return gateway_pb2.GenerateRequest(**({"max_new_tokens": 8, "method": "ngram"} | fields))


def sampling(**fields: Any) -> dict[str, Any]:
    """Return the field of a request with these sampling parameters."""
    return {"sampling": common_pb2.SamplingParams(**fields)}


async def ask(address: str, request: gateway_pb2.GenerateRequest) -> list[int]:
    """Return the token ids of an answer; raise the typed error."""
    output: list[int] = []
    async with aio_channel(address) as channel:
        try:
            async for response in gateway_pb2_grpc.GatewayServiceStub(channel).Generate(request, timeout=60):
                output += [token.token_id for token in response.chunk.tokens]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    return output


async def assert_healthy(system: System) -> None:
    """Check that nobody holds anything, and that a good request is answered with its drafter."""
    verifier, drafter = system.verifier.servicer.verifier, system.drafter.servicer.host
    backends = system.gateway.generations.backends
    assert verifier is not None
    assert drafter is not None
    assert backends is not None
    await until(lambda: verifier.num_sessions == 0 and drafter.num_sessions == 0)
    assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
    replicas = [*backends.verifiers.replicas, *backends.drafters.replicas]
    await until(lambda: all(replica.num_sessions == 0 for replica in replicas))
    # A drafter of the size that is asked for drafts however wrong it was before.
    options = GenerateOptions(max_new_tokens=6, ignore_eos=True, method="ngram", draft_depth=4)
    result = await system.client.generate(PROMPT, options)
    assert len(result.token_ids) == 6
    assert result.speculation.num_fallback_rounds == 0


def assert_refusal(
    raised: pytest.ExceptionInfo[SpecdecError], error: type[SpecdecError], field: str, fragment: str
) -> None:
    assert raised.type is error, raised.value
    assert raised.value.field == field, raised.value
    assert fragment in raised.value.message


@asynccontextmanager
async def small_system(tiny_llama: Path, **options: Any) -> AsyncIterator[System]:
    """Run all services over a pool smaller than the model's context."""
    verifier_options = {"kv_cache_mib": POOL_TOKENS * 512 / 2**20, "max_sessions": MAX_SESSIONS}
    drafters = ("ngram", f"model=causal-lm:{tiny_llama}")
    async with running_system(tiny_llama, *drafters, verifier_options=verifier_options, **options) as system:
        verifier = system.verifier.servicer.verifier
        assert verifier is not None
        assert verifier.pool.capacity_tokens == POOL_TOKENS
        yield system


def shown(value: object) -> str:
    """Return a short id of a parameter."""
    return ascii(" ".join(str(value).split()))[:40] if isinstance(value, dict) else ""

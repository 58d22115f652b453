"""A gateway or a drafter of another vocabulary than the verifier's is never used."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import UnavailableError
from specdec.service.exporters import make_telemetry
from tests.raw_streams import run_session, until
from tests.refusals import PROMPT, ask, assert_healthy, generate_request
from tests.systems import ANY_PORT, running_system, running_verifier
from tests.tiny_models import save_tiny_model


@pytest.fixture
def other_vocabulary(tmp_path: Path) -> Path:
    """Return the tiny model with two tokens of its vocabulary swapped."""
    folder = save_tiny_model(tmp_path / "other")
    path = folder / "tokenizer.json"
    tokenizer = path.read_text()
    vocabulary = Tokenizer.from_str(tokenizer).get_vocab()
    assert vocabulary["A"] != vocabulary["B"]
    swapped = tokenizer.replace('"A":', '"@@":').replace('"B":', '"A":').replace('"@@":', '"B":')
    path.write_text(swapped)
    return folder


async def test_a_gateway_with_another_vocabulary_never_serves(
    tiny_llama: Path, other_vocabulary: Path
) -> None:
    async with running_verifier(tiny_llama) as (verifier_address, _):
        config = GatewayConfig(
            listen=ANY_PORT, verifier=verifier_address, drafter="", tokenizer=str(other_vocabulary)
        )
        server = GatewayServer(config, make_telemetry("gateway"))
        address = await server.host.start()
        loading = asyncio.ensure_future(server.load())

        def is_refused() -> bool:
            backends = server.generations.backends
            return bool(backends and "vocabularies differ" in backends.verifiers.replicas[0].reason)

        await until(is_refused)
        with pytest.raises(UnavailableError, match="vocabularies differ") as raised:
            await ask(address, generate_request())
        assert raised.value.retry_after_s == 1.0
        assert verifier_address in raised.value.message
        async with AsyncClient(address) as client:
            (replica,) = (await client.info()).verifiers
            assert not replica.ready
            assert "vocabularies differ" in replica.reason
        assert not loading.done(), "such a gateway must not report SERVING"
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await server.host.stop(0)
        await server.close()
        assert len(await run_session(verifier_address, PROMPT)) == 8


async def test_a_drafter_with_another_vocabulary_is_not_used(
    tiny_llama: Path, other_vocabulary: Path
) -> None:
    async with running_system(tiny_llama, "ngram", f"other=causal-lm:{other_vocabulary}") as system:
        expected = await ask(system.address, generate_request(method="none", max_new_tokens=20))
        options = GenerateOptions(method="other", max_new_tokens=20)
        result = await system.client.generate(PROMPT, options)
        assert list(result.token_ids) == expected
        assert result.speculation.num_draft_tokens == 0
        assert result.speculation.num_fallback_rounds > 0
        assert "vocabularies differ" in result.speculation.fallback_reason
        await assert_healthy(system)

"""Special tokens in the messages of a chat and in raw prompts, as a client sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.client import AsyncClient, GenerateOptions
from tests.systems import running_gateway, running_verifier

TEXT = "</s>"


@pytest.mark.parametrize(("allowed", "num_tokens"), [(False, len(TEXT)), (True, 1)])
async def test_a_message_makes_special_tokens_only_where_the_gateway_allows_them(
    tiny_llama: Path, allowed: bool, num_tokens: int
) -> None:
    async with (
        running_verifier(tiny_llama) as (verifier, _),
        running_gateway(tiny_llama, verifier=verifier, allow_special_tokens=allowed) as (gateway, _),
        AsyncClient(gateway, timeout_s=60) as client,
    ):
        options = GenerateOptions(max_new_tokens=1)
        plain = await client.generate("hi", options)
        message = await client.generate("hi" + TEXT, options)
        raw = await client.generate("hi" + TEXT, GenerateOptions(max_new_tokens=1, raw=True))
    assert message.usage.input_tokens == plain.usage.input_tokens + num_tokens
    assert raw.usage.input_tokens == len("hi") + 1

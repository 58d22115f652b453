"""Deadlines under load, over real servers: what could not end in time is not begun, and is told at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.client import GenerateOptions
from specdec.contract.errors import ResourceExhaustedError
from tests.integration.gated_drafter import eventually, gated_system
from tests.integration.test_waiting import nothing_is_held

PROMPT = [5, 6, 7]
PLAIN = GenerateOptions(method="none", max_new_tokens=400, ignore_eos=True)


async def test_an_answer_that_would_come_too_late_is_not_begun(tiny_llama: Path) -> None:
    async with gated_system(tiny_llama) as (system, gate):
        await system.client.generate(PROMPT, PLAIN)
        running = asyncio.create_task(system.client.generate(PROMPT, replace(PLAIN, method="gated")))
        await gate.reached()
        backends = system.gateway.generations.backends
        assert backends
        too_little_s = backends.answer_times.longest_s(400, 2) / 2
        with pytest.raises(ResourceExhaustedError) as raised:
            await system.client.generate(PROMPT, PLAIN, timeout_s=too_little_s)
        assert raised.value.reason == "TOO_LITTLE_TIME"
        assert raised.value.retry_after_s
        assert (await system.client.generate(PROMPT, PLAIN)).usage.output_tokens == 400
        gate.open()
        assert (await running).usage.output_tokens == 400
        await eventually(lambda: nothing_is_held(system))

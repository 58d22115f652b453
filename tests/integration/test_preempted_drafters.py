"""Drafters that read the target's state, under preemption: the text is the target's own, and what they draft
after a session was opened again is what they would have drafted anyway."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from drafter_service.families import DrafterFactory
from specdec.client import GenerateOptions
from specdec.contract.sampling import SamplingParams
from specdec.runtime.kv_pool import BLOCK_TOKENS
from specdec.service.exporters import make_telemetry
from tests.integration import test_dflash, test_mtp
from tests.integration.gated_drafter import eventually
from tests.integration.test_waiting import nothing_is_held
from tests.slow import quick_only
from tests.systems import System, running_system
from tests.tiny_assistants import save_narrow_pair

PROMPTS = [test_mtp.PROMPT[shift:] for shift in range(4)]
LENGTH = 3 * BLOCK_TOKENS
"""Tokens of each text at its end: three blocks, of which there are as many for all."""
MODES = test_dflash.MODES
GREEDY = SamplingParams(frequency_penalty=0.4)
"""Without a penalty a tiny model's text soon goes in a circle, maybe one that the drafter never guesses."""
SAMPLED = SamplingParams(temperature=1.0, seed=3)


class Record(Protocol):
    """A draft, and what it followed."""

    @property
    def committed(self) -> tuple[int, ...]: ...

    @property
    def draft(self) -> tuple[int, ...]: ...


class Recorder(Protocol):
    """A family of drafters that keep what they drafted."""

    @property
    def records(self) -> list[Any]: ...

    @property
    def families(self) -> Mapping[str, DrafterFactory]: ...


async def texts(system: System, method: str, sampling: SamplingParams, *, at_once: bool) -> list[list[int]]:
    """Return the answers to all prompts."""

    async def ask(prompt: list[int]) -> list[int]:
        options = GenerateOptions(
            method=method,
            draft_depth=None if method == "none" else 4,
            max_new_tokens=LENGTH - len(prompt),
            ignore_eos=True,
            sampling=sampling,
        )
        return list((await system.client.generate(prompt, options)).token_ids)

    if at_once:
        return list(await asyncio.gather(*map(ask, PROMPTS)))
    return [await ask(prompt) for prompt in PROMPTS]


def rounds_after_a_reopening(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    """Return the rounds that came after one in whose place a session was opened anew."""
    found: list[ReadableSpan] = []
    reopened = set()
    rounds = [span for span in spans.get_finished_spans() if span.name == "specdec.round"]
    for span in sorted(rounds, key=lambda each: each.start_time or 0):
        assert span.context
        assert span.attributes is not None
        if span.context.trace_id in reopened:
            found.append(span)
        if span.attributes.get("specdec.is_reopened"):
            reopened.add(span.context.trace_id)
    return found


def drafts_of(recorder: Recorder) -> dict[tuple[int, ...], tuple[int, ...]]:
    records: list[Record] = recorder.records
    return {record.committed: record.draft for record in records if record.draft}


@pytest.mark.parametrize(
    ("method", "mode", "sampling"),
    quick_only(
        [
            *product(["mtp"], ["handle", "raw"], [GREEDY, SAMPLED]),
            *product(["dflash"], MODES, [GREEDY, SAMPLED]),
        ],
        [("mtp", "handle", SAMPLED), ("mtp", "raw", GREEDY), ("dflash", "projected", SAMPLED)],
    ),
)
async def test_after_a_preemption_drafts_are_what_they_would_have_been(
    method: str, mode: str, sampling: SamplingParams, tmp_path: Path
) -> None:
    undisturbed: Recorder
    disturbed: Recorder
    if method == "mtp":
        target, drafter = save_narrow_pair(tmp_path, "gemma4")
        undisturbed, disturbed = test_mtp.Recorder(), test_mtp.Recorder()
    else:
        target, drafter = test_dflash.save_pair(tmp_path, "llama")
        undisturbed, disturbed = test_dflash.Recorder(), test_dflash.Recorder()
    options = {**MODES[mode][1], "target": str(target)}
    async with running_system(
        target, f"{method}:{drafter}", families=undisturbed.families, drafter_options=options
    ) as system:
        verifier = system.verifier.servicer.verifier
        assert verifier
        pool = verifier.pool
        # Layers with a window have blocks of their own: there is room for three blocks of each kind.
        num_blocks = pool.full.num_blocks + (pool.sliding.num_blocks if pool.sliding else 0)
        block_mib = 4.0 / num_blocks * (2 if pool.sliding else 1)
        expected = await texts(system, "none", sampling, at_once=False)
        assert await texts(system, method, sampling, at_once=False) == expected
    spans = InMemorySpanExporter()
    async with running_system(
        target,
        f"{method}:{drafter}",
        families=disturbed.families,
        telemetry=make_telemetry("test", span_processor=SimpleSpanProcessor(spans)),
        verifier_options={"kv_cache_mib": 3.01 * block_mib},
        drafter_options=options,
    ) as system:
        assert await texts(system, method, sampling, at_once=True) == expected
        await eventually(lambda: nothing_is_held(system))
    later = rounds_after_a_reopening(spans)
    assert later, "nobody was preempted"
    accepted = [span.attributes.get("specdec.num_accepted_tokens", 0) for span in later if span.attributes]
    assert sum(number for number in accepted if isinstance(number, int)) > 0
    drafts, usual = drafts_of(disturbed), drafts_of(undisturbed)
    both = drafts.keys() & usual.keys()
    assert len(both) > len(drafts) / 4
    assert {key: drafts[key] for key in both} == {key: usual[key] for key in both}

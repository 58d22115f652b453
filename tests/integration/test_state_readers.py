"""Whoever maps the pool sees positions as they were when they became final, whatever else runs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from specdec.contract.target_state import TargetStateRef
from tests.probe_service import ENV
from tests.raw_streams import output_of, until
from tests.state_probe import all_of, partly_right, ref_of, scattered, state_session
from tests.state_watcher import describe, describe_progress
from tests.systems import running_verifier

NUM_TOKENS = 100
PROMPT = [(7 * i) % 250 for i in range(70)]


class Watching:
    """A process that reads a session's state all the time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, ref: TargetStateRef) -> Watching:
        """Start the process with a session's first handle; return once it reads what that permits."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.state_watcher",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **ENV},
        )
        watching = cls(process)
        watching._tell(describe(ref))
        watching.extend(ref)
        assert process.stdout
        assert await process.stdout.readline() == b"watching\n"
        return watching

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def extend(self, ref: TargetStateRef) -> None:
        """Tell the process of the next handle: which blocks are new, and how many positions are final."""
        self._tell(describe_progress(ref))

    async def finish(self) -> tuple[int, int]:
        """Return the number of positions compared, and of positions that had changed."""
        output, _ = await self._process.communicate(b"")  # which ends the input
        assert self._process.returncode == 0
        num_compared, num_changed = json.loads(output)
        return num_compared, num_changed


async def watched_session(address: str, prompt: Sequence[int], family: str) -> tuple[int, int]:
    """Run a session with drafts that are refused at every place, while another process reads its state."""
    expected = await output_of(address, prompt, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    async with state_session(address, prompt, all_of(family), max_new_tokens=NUM_TOKENS) as (stream, ref):
        watching = await Watching.start(ref)
        for num_round in range(NUM_TOKENS):
            done = len(stream.token_ids) - len(prompt)
            if done == NUM_TOKENS:
                break
            result = await stream.round(partly_right(expected[done : done + 6], num_round % 7))
            watching.extend(ref_of(result))
            await asyncio.sleep(0.005)
        assert stream.token_ids[len(prompt) :] == expected
        return await watching.finish()


async def other_sessions(address: str, seed: int, is_over: asyncio.Event) -> int:
    """Run sessions that come and go, take each other's blocks and share passes; return their number."""
    random, num_sessions = Random(seed), 0
    while not is_over.is_set():
        prompt = [random.randrange(256) for _ in range(random.choice([3, 60, 140]))]
        async with state_session(address, prompt, all_of("llama"), max_new_tokens=40) as (stream, _):
            for _ in range(random.randrange(4)):
                await stream.round([random.randrange(256) for _ in range(5)])
        num_sessions += 1
    return num_sessions


@pytest.mark.parametrize("is_scattered", [False, True], ids=["run", "scattered"])
async def test_nobody_sees_a_final_position_change(
    is_scattered: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    options = {"kv_cache_mib": 2.0, "shared_dir": str(tmp_path), "prefill_chunk_tokens": 32}
    async with running_verifier(tiny_llama, **options) as (address, server):
        verifier = server.servicer.verifier
        assert verifier is not None
        is_over = asyncio.Event()
        with scattered(verifier.pool) if is_scattered else nullcontext():
            others = [asyncio.ensure_future(other_sessions(address, seed, is_over)) for seed in range(3)]
            watched = await asyncio.gather(
                *(watched_session(address, prompt, "llama") for prompt in (PROMPT, PROMPT[::-1]))
            )
            is_over.set()
            num_others = sum(await asyncio.gather(*others))
        for num_compared, num_changed in watched:
            assert num_changed == 0
            assert num_compared > 10 * 13 * len(PROMPT)
        assert num_others > 10
        await until(lambda: verifier.pool.free_tokens == verifier.pool.capacity_tokens)


async def test_a_watcher_would_see_a_change(tiny_llama: Path, tmp_path: Path) -> None:
    """The same process reports changes if it is told that positions are final which are not."""
    async with running_verifier(tiny_llama, shared_dir=str(tmp_path)) as (address, _):
        spec = all_of("llama")
        async with state_session(address, PROMPT, spec) as (stream, ref):
            await stream.round([1, 2, 3, 4, 5, 6])
            watching = await Watching.start(replace(ref, cached_length=len(PROMPT) + 6))
            while len(stream.token_ids) < len(PROMPT) + 8:
                await stream.round()
            await asyncio.sleep(0.1)
            num_compared, num_changed = await watching.finish()
        assert 0 < num_changed < num_compared

"""The run: which method answers which prompts when, and a record for each request."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from specdec.bench.records import Contender, RequestRecord
from specdec.bench.workload import Prompt
from specdec.contract.errors import SpecdecError

PROMPTS_PER_WORKER = 2
"""Prompts per worker in a block: enough to keep workers busy while the slowest ends, and few enough for the
methods to take turns often."""


@dataclass(frozen=True, slots=True)
class Block:
    """Prompts that one method answers, with all their turns, before the next method has its go."""

    contender: Contender
    concurrency: int
    prompts: tuple[Prompt, ...]
    ask: int = 1
    """Which time the prompts are asked, counted from 1."""
    cache_salt: str = ""
    """The salt of all requests of the block; empty: each has a salt of its own."""
    pair: int = 0
    """Its number, which the blocks of all contenders with these prompts have."""

    @property
    def num_requests(self) -> int:
        """How many requests the block has, where none fails: one for each turn."""
        return sum(1 + len(prompt.later_turns) for prompt in self.prompts)


def schedule(
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    concurrencies: Sequence[int],
    num_asks: int = 1,
) -> Iterator[Block]:
    """Yield blocks in the order they run: all contenders have a prompt before any has the next one.

    At concurrency 1 a block is one prompt. The order of the contenders rotates from prompt to prompt, so that
    no contender always runs right after the same other. Contenders that are not concurrent run only at 1.
    All prompts are asked once before any is asked again. A contender with memory remembers what it answered
    at the same concurrency, and nothing of other contenders or other schedules.
    """
    for concurrency in concurrencies:
        size = 1 if concurrency == 1 else PROMPTS_PER_WORKER * concurrency
        present = [c for c in contenders if concurrency == 1 or c.is_concurrent]
        salts = {contender.method: _new_salt() if contender.has_memory else "" for contender in present}
        places = product(range(1, num_asks + 1), range(0, len(prompts), size))
        for shift, (ask, start) in enumerate(places):
            for place in range(len(present)):
                contender = present[(shift + place) % len(present)]
                some = tuple(prompts[start : start + size])
                yield Block(contender, concurrency, some, ask, salts[contender.method], shift)


def _new_salt() -> str:
    return uuid.uuid4().hex


async def warm_up(contenders: Sequence[Contender], prompts: Sequence[Prompt]) -> None:
    """Let every contender answer the prompts once, unrecorded; the run itself will show failures."""
    for block in schedule(contenders, prompts, [1]):
        await _run_block(block)


async def run(
    blocks: Sequence[Block],
    report: Callable[[list[RequestRecord]], None] = lambda records: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RequestRecord]:
    """Run blocks one after the other; failed requests are recorded, and the run goes on.

    Args:
        blocks: blocks from `schedule`.
        report: called with the records of each block as it ends.
        on_progress: called after each block with the number of requests done and of all requests.
    """
    total = sum(block.num_requests for block in blocks)
    records: list[RequestRecord] = []
    num_done = 0
    for block in blocks:
        finished = await _run_block(block)
        report(finished)
        records += finished
        num_done += block.num_requests
        on_progress(num_done, total)
    return records


async def _run_block(block: Block) -> list[RequestRecord]:
    slots = asyncio.Semaphore(block.concurrency)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_run_conversation(block, prompt, slots)) for prompt in block.prompts]
    block_ms = (time.perf_counter() - started) * 1e3
    records = [record for task in tasks for record in task.result()]
    wall_ms = sum(record.wall_ms for record in records)
    return [replace(record, busy_ms=block_ms * record.wall_ms / wall_ms) for record in records]


async def _run_conversation(block: Block, prompt: Prompt, slots: asyncio.Semaphore) -> list[RequestRecord]:
    """Ask all turns of a prompt one after the other; a turn that fails is the last one."""
    records: list[RequestRecord] = []
    turn: Prompt | None = prompt
    async with slots:
        while turn is not None:
            record = await _run_request(block, turn)
            records.append(record)
            turn = turn.next(record.answer.text) if record.answer else None
    return records


async def _run_request(block: Block, prompt: Prompt) -> RequestRecord:
    salted = replace(prompt, cache_salt=block.cache_salt or _new_salt())
    started = time.perf_counter()
    answer, error = None, ""
    try:
        answer = await block.contender.backend.generate(salted)
    except SpecdecError as failure:
        error = f"{type(failure).__name__}: {failure.message}"
    wall_ms = (time.perf_counter() - started) * 1e3
    return RequestRecord(
        method=block.contender.method,
        concurrency=block.concurrency,
        source=prompt.source,
        question_id=prompt.question_id,
        category=prompt.category,
        wall_ms=wall_ms,
        busy_ms=wall_ms,
        answer=answer,
        error=error,
        ask=block.ask,
        turn=prompt.turn,
        pair=block.pair,
    )

"""The run: which method answers which prompts when, and a record for each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from specdec.bench.records import Contender, RequestRecord
from specdec.bench.workload import Prompt
from specdec.contract.errors import SpecdecError

_PROMPTS_PER_WORKER = 2
"""Prompts per worker in a block: enough to keep workers busy while the slowest ends, and few enough for the
methods to take turns often."""


@dataclass(frozen=True, slots=True)
class Block:
    """Prompts that one method answers before the next has its turn."""

    contender: Contender
    concurrency: int
    prompts: tuple[Prompt, ...]


def schedule(
    contenders: Sequence[Contender], prompts: Sequence[Prompt], concurrencies: Sequence[int]
) -> Iterator[Block]:
    """Yield blocks in the order they run: all contenders have a prompt before any has the next one.

    At concurrency 1 a block is one prompt. The order of the contenders rotates from prompt to prompt, so that
    no contender always runs right after the same other. Contenders that are not concurrent run only at 1.
    """
    for concurrency in concurrencies:
        size = 1 if concurrency == 1 else _PROMPTS_PER_WORKER * concurrency
        present = [c for c in contenders if concurrency == 1 or c.is_concurrent]
        for turn, start in enumerate(range(0, len(prompts), size)):
            for place in range(len(present)):
                contender = present[(turn + place) % len(present)]
                yield Block(contender, concurrency, tuple(prompts[start : start + size]))


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
    total = sum(len(block.prompts) for block in blocks)
    records: list[RequestRecord] = []
    for block in blocks:
        finished = await _run_block(block)
        report(finished)
        records += finished
        on_progress(len(records), total)
    return records


async def _run_block(block: Block) -> list[RequestRecord]:
    slots = asyncio.Semaphore(block.concurrency)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_run_request(block, prompt, slots)) for prompt in block.prompts]
    block_ms = (time.perf_counter() - started) * 1e3
    records = [task.result() for task in tasks]
    wall_ms = sum(record.wall_ms for record in records)
    return [replace(record, busy_ms=block_ms * record.wall_ms / wall_ms) for record in records]


async def _run_request(block: Block, prompt: Prompt, slots: asyncio.Semaphore) -> RequestRecord:
    async with slots:
        started = time.perf_counter()
        answer, error = None, ""
        try:
            answer = await block.contender.backend.generate(prompt)
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
    )

"""One run of offered loads, from its configuration to its files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from specdec.bench.journal import REQUESTS_FILE
from specdec.bench.load import LoadCaller, LoadConfig, LoadRecord, offer, saturate
from specdec.bench.load_report import Capacity, LoadOutcome, write
from specdec.bench.load_stats import CallerRow, LoadRow, caller_rows, goodput, load_row
from specdec.bench.provenance import collect
from specdec.bench.workload import Prompt, name_of, sha256_of
from specdec.client import AsyncClient
from specdec.contract.errors import UnavailableError

OnProgress = Callable[[str, int, int], None]
"""Called with what is under way, how much of it is done, and of how much."""


def names_of(num_callers: int) -> list[str]:
    """Return the callers' names; the first one makes most of the requests."""
    return [f"caller-{number}" for number in range(1, num_callers + 1)]


def run_load(
    config: LoadConfig,
    gateway: str,
    directory: Path,
    tokens: Sequence[str] = (),
    on_progress: OnProgress = lambda what, done, total: None,
) -> LoadOutcome:
    """Run against a gateway; write results.json and table.md, and requests.jsonl as each load ends.

    Args:
        config: what to offer; it is valid.
        gateway: address of the gateway.
        directory: folder for the files, which is made if it does not exist.
        tokens: bearer token of each caller; empty: the callers have none.
        on_progress: called as requests end.

    Raises:
        SpecdecError: the gateway cannot run it. Requests that fail raise nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    prompts = config.load_prompts()
    with (directory / REQUESTS_FILE).open("w", encoding="utf-8") as file:
        outcome = asyncio.run(_run(config, gateway, prompts, tokens, on_progress, file))
    write(directory, outcome)
    return outcome


async def _run(
    config: LoadConfig,
    gateway: str,
    prompts: Sequence[Prompt],
    tokens: Sequence[str],
    on_progress: OnProgress,
    file: TextIO,
) -> LoadOutcome:
    provenance = collect() | _describe(config, prompts)
    secrets = tokens or [""] * config.num_callers
    names = names_of(len(secrets))
    provenance |= {"callers": names, "has_tokens": bool(tokens)} | await _model(gateway, secrets[0])
    async with AsyncExitStack() as stack:
        callers = [
            await stack.enter_async_context(LoadCaller(name, gateway, secret))
            for name, secret in zip(names, secrets, strict=True)
        ]
        capacity = await _capacity(config, callers, prompts, on_progress, file)
        per_s = capacity.answers_per_s if capacity else 1.0
        rates = config.rates or tuple(multiple * per_s for multiple in config.multiples)
        rows: list[LoadRow] = []
        of_callers: list[CallerRow] = []
        records: list[LoadRecord] = []
        for rate in rates:
            show = partial(on_progress, f"{rate:.2f} requests/s")
            ended = await offer(config, rate, callers, prompts, show)
            _keep(ended, file)
            records += ended
            rows.append(load_row(ended, config, rate, capacity.answers_per_s if capacity else None))
            of_callers += caller_rows(ended, config, rate, names)
    return LoadOutcome(rows, of_callers, capacity, records, provenance)


async def _model(gateway: str, token: str) -> dict[str, Any]:
    async with AsyncClient(gateway, token=token) as client:
        info = await client.info()
    if info.model is None:
        raise UnavailableError(
            "No verifier has been ready at this gateway yet; try again when it has loaded."
        )
    return {"model": info.model.model_id, "dtype": info.model.dtype, "device": info.model.device}


async def _capacity(
    config: LoadConfig,
    callers: Sequence[LoadCaller],
    prompts: Sequence[Prompt],
    on_progress: OnProgress,
    file: TextIO,
) -> Capacity | None:
    """Measure what the system can do, unless rates are given."""
    if config.rates:
        return None
    records = await saturate(config, callers, prompts, partial(on_progress, "Capacity, seconds"))
    _keep(records, file)
    return Capacity(*goodput(records, config))


def _keep(records: Sequence[LoadRecord], file: TextIO) -> None:
    file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
    file.flush()


def _describe(config: LoadConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    settings = asdict(config)
    paths = settings.pop("prompts_paths")
    return settings | {
        "prompts": ", ".join(map(name_of, paths)),
        "prompts_sha256": sha256_of(paths),
        "num_prompts": len(prompts),
    }

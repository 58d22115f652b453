"""Thousands of requests, of which many are wrong, late, slow or given up: nothing is left of them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import SpecdecError
from specdec.contract.sampling import SamplingParams
from specdec.local.processes import Service, free_ports
from tests.drills.fleet import METHODS, one_service, until_all_ready
from tests.probe_service import is_serving
from tests.raw_streams import until

NUM_REQUESTS, NUM_WARM_UP = 2000, 400
CONCURRENCY = 16
NUM_TOKENS = 32
MAX_GROWTH_BYTES = 32 * 2**20
MAX_MORE_THREADS = MAX_MORE_FILES = 8
"""gRPC's own pool of threads grows and shrinks with the load, and so do the files that wake them."""
KINDS = ("whole", "cancelled", "late", "bad", "slow")
WEIGHTS = (50, 20, 10, 10, 10)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds."""

    threads: int
    files: int
    rss_bytes: int


def holdings(service: Service) -> Holdings:
    """Return what a service holds now."""
    process = psutil.Process(service.pid)
    return Holdings(process.num_threads(), process.num_fds(), process.memory_info().rss)


def state_files(shared_dir: Path) -> set[Path]:
    """Return the files through which services share state."""
    return set(shared_dir.glob("specdec-*/*"))


async def one_request(client: AsyncClient, rng: random.Random) -> str:
    """Run a request of a random kind; return how it ended."""
    (kind,) = rng.choices(KINDS, WEIGHTS)
    prompt = [rng.randrange(5, 250) for _ in range(rng.choice((3, 20, 100)))]
    method = rng.choice(METHODS)
    options = GenerateOptions(
        max_new_tokens=NUM_TOKENS,
        ignore_eos=True,
        method=method,
        draft_depth=None if method == "none" else rng.randrange(1, 5),
        sampling=SamplingParams(temperature=rng.choice((0.0, 0.9)), seed=rng.randrange(100)),
    )
    timeout_s = rng.random() / 50 if kind == "late" else 120.0
    if kind == "bad":
        prompt[rng.randrange(len(prompt))] = 10**6
    try:
        num_wanted = rng.randrange(NUM_TOKENS) if kind == "cancelled" else NUM_TOKENS
        async with client.stream(prompt, options, timeout_s=timeout_s) as stream:
            async for _ in stream:
                if kind == "slow":
                    await asyncio.sleep(0.01)
                num_wanted -= 1
                if num_wanted < 0:
                    return "cancelled"
        assert len(stream.result.token_ids) == NUM_TOKENS
    except SpecdecError as error:
        if kind not in ("bad", "late"):
            raise
        return type(error).__name__
    return "whole"


async def soak(address: str, num_requests: int, seed: int) -> Counter[str]:
    """Run requests, so many at a time; return how they ended."""
    rngs = iter([random.Random(seed * num_requests + index) for index in range(num_requests)])
    endings: Counter[str] = Counter()

    async def work() -> None:
        async with AsyncClient(address, timeout_s=120) as client:
            for rng in rngs:
                endings[await one_request(client, rng)] += 1

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return endings


@pytest.mark.drill
@pytest.mark.timeout(900)
async def test_nothing_is_left_of_two_thousand_requests(
    tiny_llama: Path, noisy_llama: Path, tmp_path: Path
) -> None:
    names = ("gateway", "verifier", "drafter")
    at = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(3), strict=True)}
    shared = ("--shared-dir", str(tmp_path))
    arguments = {
        "gateway": ("--verifier", at["verifier"], "--drafter", at["drafter"]),
        "verifier": shared,
        "drafter": shared,
    }
    services = {
        name: one_service(name, at[name], tmp_path, tiny_llama, noisy_llama, *arguments[name])
        for name in names
    }
    try:
        for service in services.values():
            service.start()
        for service in services.values():
            await until(partial(is_serving, service), timeout_s=60)
        async with AsyncClient(at["gateway"], timeout_s=30) as client:
            await until_all_ready(client)
            await soak(at["gateway"], NUM_WARM_UP, seed=1)
            await until_all_ready(client)
            before = {name: holdings(service) for name, service in services.items()}
            files = state_files(tmp_path)
            endings = await soak(at["gateway"], NUM_REQUESTS, seed=2)
            await until_all_ready(client)
            info = (await client.info()).verifiers[0].info
            assert info is not None
            assert info.num_sessions == 0
            limits = {name: before[name].files + MAX_MORE_FILES for name in names}
            await until(lambda: all(holdings(services[name]).files <= limits[name] for name in names))
            after = {name: holdings(service) for name, service in services.items()}
        assert state_files(tmp_path) == files
    finally:
        for service in services.values():
            service.stop(5)
    print(f"endings {dict(endings)}")
    for name in names:
        print(f"{name}: before {before[name]}, after {after[name]}")
        assert after[name].threads <= before[name].threads + MAX_MORE_THREADS
        assert after[name].rss_bytes - before[name].rss_bytes < MAX_GROWTH_BYTES
    assert endings.total() == NUM_REQUESTS
    assert endings["whole"] > NUM_REQUESTS // 2
    assert min(endings["cancelled"], endings["InvalidArgumentError"], endings["DeadlineExceededError"]) > 50

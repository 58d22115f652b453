"""Two gateways, two verifiers and two drafters, each in a process of its own, and clients that stream."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import SpecdecError
from specdec.contract.sampling import SamplingParams
from specdec.local.processes import Service, ServiceSpec, free_ports
from tests.probe_service import ENV, is_serving, verifier_command
from tests.raw_streams import until

NUM_SESSIONS = 8
NUM_TOKENS = 400
METHODS = ("none", "noisy", "noisy+ngram", "ngram")


class Fleet:
    """The processes, by names such as "verifier-0". Use as `with`."""

    def __init__(self, model: Path, drafter: Path, log_dir: Path) -> None:
        names = [f"{kind}-{index}" for kind in ("gateway", "verifier", "drafter") for index in range(2)]
        self.addresses = {
            name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(len(names)), strict=True)
        }
        self._model, self._drafter = model, drafter
        self._log_dir = log_dir
        self._ending: list[Service] = []
        """Processes that were told to end."""
        self.services = {name: self._service(name) for name in names}
        self._undisturbed: list[Session] = []

    def __enter__(self) -> Fleet:
        self._log_dir.mkdir()
        for service in self.services.values():
            service.start()
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.services.values():
            if service.exit_code is None:
                os.kill(service.pid, signal.SIGCONT)
            service.stop(5)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process."""
        os.kill(self.services[name].pid, number)
        if number != signal.SIGSTOP:
            self._ending.append(self.services[name])

    async def serve(self) -> None:
        """Start what has ended, let go on what was stopped, and wait until all of it serves."""
        while self._ending:
            service = self._ending.pop()
            await until(partial(_has_ended, service), timeout_s=60)
            service.start()
        for service in self.services.values():
            os.kill(service.pid, signal.SIGCONT)
        for service in self.services.values():
            await until(partial(is_serving, service), timeout_s=60)
        for address in self.gateways:
            async with AsyncClient(address, timeout_s=30) as client:
                await until_all_ready(client)

    async def undisturbed(self) -> list[Session]:
        """Return the sessions of a drill as they are where nothing happens."""
        if not self._undisturbed:
            self._undisturbed = new_sessions()
            await run_sessions(self._undisturbed, self.gateways)
        return self._undisturbed

    @property
    def gateways(self) -> list[str]:
        """Addresses of the gateways."""
        return [address for name, address in self.addresses.items() if name.startswith("gateway")]

    def _service(self, name: str) -> Service:
        """Return a process; gateways know all others."""
        peers = [
            argument
            for kind in ("verifier", "drafter")
            for argument in (f"--{kind}", ",".join(self.addresses[f"{kind}-{index}"] for index in range(2)))
        ]
        extra = peers if name.startswith("gateway") else []
        return one_service(name, self.addresses[name], self._log_dir, self._model, self._drafter, *extra)


def one_service(
    name: str, address: str, log_dir: Path, model: Path, drafter: Path, *arguments: str
) -> Service:
    """Return a process that has not started: a gateway, a verifier or a drafter, as its name begins."""
    kind = name.partition("-")[0]
    run = (sys.executable, "-m")
    drafters = ("--drafter", f"noisy=causal-lm:{drafter}", "--drafter", "ngram")
    command = {
        "gateway": (*run, "gateway", "--listen", address, "--tokenizer", str(model)),
        "verifier": verifier_command(address, model),
        "drafter": (*run, "drafter_service", "--listen", address, *drafters, "--dtype", "float32"),
    }[kind]
    spec = ServiceSpec(name, address, (*command, *arguments), f"specdec.v1.{kind.capitalize()}Service")
    return Service(spec, log_dir, {**os.environ, **ENV}, lambda spawn: spawn())


async def until_all_ready(client: AsyncClient) -> None:
    """Wait until a gateway may use all its replicas, none of which runs a session."""

    async def all_ready() -> bool:
        info = await client.info()
        return all(
            replica.ready and not replica.num_sessions for replica in (*info.verifiers, *info.drafters)
        )

    give_up_at = time.monotonic() + 30
    while not await all_ready():
        assert time.monotonic() < give_up_at, await client.info()
        await asyncio.sleep(0.1)


@dataclass(slots=True)
class Session:
    """One streamed answer and what its reader saw."""

    prompt: Sequence[int]
    options: GenerateOptions
    token_ids: list[int] = field(default_factory=list)
    pause_s: float = 0.0
    """The longest time between two tokens, seconds."""
    error: SpecdecError | None = None
    num_failovers: int = 0

    async def run(self, address: str) -> None:
        """Stream the answer, by a client of its own."""
        async with AsyncClient(address, timeout_s=120) as client:
            await self.run_on(client)

    async def run_on(self, client: AsyncClient) -> None:
        """Stream the answer."""
        try:
            await self._read(client)
        except SpecdecError as error:
            self.error = error

    async def _read(self, client: AsyncClient) -> None:
        last = time.monotonic()
        async with client.stream(self.prompt, self.options) as stream:
            async for token in stream:
                self.token_ids.append(token.token_id)
                now = time.monotonic()
                self.pause_s, last = max(self.pause_s, now - last), now
            self.num_failovers = stream.result.num_failovers


def new_sessions(num_tokens: int = NUM_TOKENS) -> list[Session]:
    """Return the sessions of a drill: greedy ones and ones with seeds, of all methods."""
    return [
        Session(
            [5 + index, 6, 7, 5 + index, 6, 7],
            GenerateOptions(
                max_new_tokens=num_tokens,
                ignore_eos=True,
                method=METHODS[index // 2],
                draft_depth=0 if index < 2 else 3,
                sampling=SamplingParams(temperature=0.9, seed=index) if index % 2 else SamplingParams(),
            ),
        )
        for index in range(NUM_SESSIONS)
    ]


async def run_sessions(
    sessions: Sequence[Session], addresses: Sequence[str], disturb: Callable[[], None] = lambda: None
) -> None:
    """Run sessions at once, on gateways by turns; `disturb` is called when each has a tenth of its tokens."""
    running = [
        asyncio.ensure_future(session.run(addresses[index % len(addresses)]))
        for index, session in enumerate(sessions)
    ]
    await until(lambda: all(len(session.token_ids) >= NUM_TOKENS // 10 for session in sessions), timeout_s=60)
    disturb()
    await asyncio.gather(*running)


@asynccontextmanager
async def steady_load(address: str, num_tokens: int = NUM_TOKENS) -> AsyncIterator[list[Session]]:
    """Keep eight clients streaming, one answer after the other; yield the sessions that have ended so far."""
    ended: list[Session] = []
    is_over = False

    async def stream(index: int) -> None:
        async with AsyncClient(address, timeout_s=120) as client:
            while not is_over:
                session = new_sessions(num_tokens)[index]
                await session.run_on(client)
                ended.append(session)

    running = [asyncio.ensure_future(stream(index)) for index in range(NUM_SESSIONS)]
    try:
        yield ended
    finally:
        is_over = True
        await asyncio.gather(*running)


def assert_all_as_ever(sessions: Sequence[Session], num_tokens: int = NUM_TOKENS) -> None:
    """Check that every answer is whole, and is what it was before."""
    assert not [session.error for session in sessions if session.error]
    by_prompt: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for session in sessions:
        assert len(session.token_ids) == num_tokens
        by_prompt.setdefault(tuple(session.prompt), set()).add(tuple(session.token_ids))
    assert all(len(answers) == 1 for answers in by_prompt.values())


def _has_ended(service: Service) -> bool:
    return service.exit_code is not None

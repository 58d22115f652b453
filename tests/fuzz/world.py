"""Real servers on a thread of their own, and the proof that they are whole."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from hypothesis import HealthCheck, settings

from specdec.client import GenerateOptions
from specdec.transport.channel import aio_channel
from tests.raw_streams import output_of, until
from tests.refusals import PROMPT
from tests.state_probe import StateProbe, all_of
from tests.systems import System, running_system

EXAMPLES = int(os.environ.get("SPECDEC_FUZZ_EXAMPLES", "0"))
"""How many examples a test tries; 0: few, and the same ones every time."""
HANG_S = 60.0
"""Nothing takes so long but what never ends."""
NUM_TOKENS = 40

Code = grpc.StatusCode
PROPER = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.FAILED_PRECONDITION,
    Code.NOT_FOUND,
    Code.RESOURCE_EXHAUSTED,
    Code.CANCELLED,
    Code.DEADLINE_EXCEEDED,
    Code.UNAVAILABLE,  # of a drafter that was told of a verifier nobody runs
}
"""What a call may end with, whatever is sent: never UNKNOWN or INTERNAL."""

_BROKEN_WRITE = "Internal error from Core"
"""What grpc.aio says of a call that ended while a message was written; the status it ended with is lost."""

ResultT = TypeVar("ResultT")


async def code_of(call: Any) -> grpc.StatusCode:
    """Wait until a call has ended, and return its status code."""
    code: grpc.StatusCode = await call.code()
    return Code.CANCELLED if await call.details() == _BROKEN_WRITE else code


def fuzzing(few: int, **options: Any) -> settings:
    """Return the settings of a test: `few` examples in the suite, as many as SPECDEC_FUZZ_EXAMPLES says
    elsewhere.
    """
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )


class World:
    """A system under fire. Every method may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stack = AsyncExitStack()
        self.system: System
        self.channels: Mapping[str, grpc.aio.Channel]
        """By service: "gateway", "verifier", "drafter"."""
        self.expected: list[int]
        """The prompt, and what the target makes of it."""

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine on the servers' loop and return its result."""

        async def bounded() -> ResultT:
            async with asyncio.timeout(HANG_S):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    async def start(self, model: Path, shared_dir: Path) -> None:
        """Start the services; one of their drafters reads all of the target's state."""
        self.shared_dir = shared_dir
        self.probe = StateProbe(all_of("llama"))
        shared = {"shared_dir": str(shared_dir)}
        self.system = await self._stack.enter_async_context(
            running_system(
                model,
                *("ngram", f"model=causal-lm:{model}", "probe"),
                families=self.probe.families,
                verifier_options={**shared, "kv_cache_mib": 8.0},
                drafter_options=shared,
                gateway_options={"draft_timeout_s": 5.0},
            )
        )
        self.system.verifier.servicer.write_timeout_s = 2.0
        self.system.verifier.servicer.upload_timeout_s = 2.0
        addresses = {
            "gateway": self.system.address,
            "verifier": self.system.verifier_address,
            "drafter": self.system.drafter_address,
        }
        self.channels = {
            name: await self._stack.enter_async_context(aio_channel(address))
            for name, address in addresses.items()
        }
        output = await output_of(
            self.system.verifier_address, PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True
        )
        self.expected = [*PROMPT, *output]
        # Memory that is made when it is first asked for, and kept.
        verifier = self.system.verifier.servicer.verifier
        assert verifier
        await verifier.weights()
        await self.system.client.generate(PROMPT, GenerateOptions(max_new_tokens=4, method="probe"))
        self._files = self._shared_files()
        await self.assert_whole()

    async def stop(self) -> None:
        """Stop the services."""
        await self._stack.aclose()
        self.probe.sessions.clear()  # what they read is mapped for as long as they are kept

    def _shared_files(self) -> set[str]:
        return {str(path) for path in self.shared_dir.rglob("*") if path.is_file()}

    async def assert_whole(self) -> None:
        """Check that nobody holds anything, and that right requests get the right tokens by every method."""
        verifier, drafter = self.system.verifier.servicer.verifier, self.system.drafter.servicer.host
        backends = self.system.gateway.generations.backends
        assert verifier
        assert drafter
        assert backends
        await until(lambda: verifier.num_sessions == drafter.num_sessions == 0, timeout_s=HANG_S / 2)
        await until(lambda: verifier.export.num_streams == 0, timeout_s=HANG_S / 2)
        assert verifier.export.num_sessions == 0
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
        assert drafter.reader
        assert not drafter.reader.links
        assert drafter.reader.mirrors.num_used == 0
        replicas = [*backends.verifiers.replicas, *backends.drafters.replicas]
        await until(lambda: all(replica.num_sessions == 0 for replica in replicas), timeout_s=HANG_S / 2)
        self.probe.sessions.clear()
        assert self._shared_files() == self._files
        for method in ("ngram", "model", "probe"):
            result = await self.system.client.generate(
                PROMPT,
                GenerateOptions(max_new_tokens=6, ignore_eos=True, method=method, draft_depth=3),
            )
            assert list(result.token_ids) == self.expected[len(PROMPT) :][:6]
            assert result.speculation.num_fallback_rounds == 0, result.speculation.fallback_reason
        await until(lambda: verifier.num_sessions == drafter.num_sessions == 0, timeout_s=HANG_S / 2)


@contextmanager
def running_world(model: Path, shared_dir: Path) -> Iterator[World]:
    """Run a world for as long as the block lasts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="servers")
    thread.start()
    world = World(loop)
    try:
        world.run(world.start(model, shared_dir))
        yield world
    finally:
        world.run(world.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

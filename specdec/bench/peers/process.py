"""The side of a run: a peer's program as a backend, and programs that a run needs the output of."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from specdec.bench.records import Answer
from specdec.bench.workload import Prompt
from specdec.client import GenerateOptions
from specdec.contract.errors import DeadlineExceededError, InternalError, UnavailableError
from specdec.service.tuning import spin_count

_LINE_LIMIT_BYTES = 2**24
_STDERR_TAIL_BYTES = 2000
_EXIT_TIMEOUT_S = 10.0


class PeerBackend:
    """A peer's program: `async with` starts it and loads the model, and ends it.

    Args:
        name: the peer's name in the results.
        command: the program and its arguments; it speaks as `specdec.bench.peers.worker` describes.
        options: limits and sampling; method and K do not apply.
        timeout_s: how long the model may take to load, and a request to be answered, seconds.
    """

    def __init__(
        self, name: str, command: Sequence[str], options: GenerateOptions, timeout_s: float = 300.0
    ) -> None:
        self.name = name
        self.description: dict[str, Any] = {}
        self._command = command
        self._options = options
        self._timeout_s = timeout_s
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        # A file, not a pipe: nobody has to drain it while the worker runs.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=self._stderr,
                limit=_LINE_LIMIT_BYTES,
                env=_environment(),
            )
            ready = await self._read_reply()
        except BaseException:
            await self._stop(at_once=True)
            raise
        self.description = {name: value for name, value in ready.items() if name != "ready"}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop(at_once=kind is not None)

    async def generate(self, prompt: Prompt) -> Answer:
        """Answer a prompt that has its token ids, see `Backend`. It takes one request at a time."""
        request = {
            "prompt_token_ids": prompt.token_ids,
            "max_new_tokens": self._options.max_new_tokens,
            "temperature": self._options.sampling.temperature,
            "seed": self._options.sampling.noise_seed,
        }
        reply = await self._ask(request)
        return Answer(
            token_ids=tuple(reply["token_ids"]),
            input_tokens=len(prompt.token_ids),
            ttft_ms=reply["ttft_ms"],
            tpot_ms=reply["tpot_ms"],
            finish_reason=reply["finish_reason"],
            speculation=None,
        )

    async def fill_cache(self, context_token_ids: Sequence[int]) -> None:
        """Fill the cache that `time_pass` runs over. Errors are those of `Backend`."""
        await self._ask({"context_token_ids": list(context_token_ids)})

    async def time_pass(self, token_ids: Sequence[int]) -> int:
        """Run a forward pass over the cache, which keeps the first token; return its time, nanoseconds."""
        reply = await self._ask({"pass_token_ids": list(token_ids)})
        elapsed_ns: int = reply["pass_ns"]
        return elapsed_ns

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
        except ConnectionError as error:
            raise self._gone() from error
        return await self._read_reply()

    async def _read_reply(self) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), self._timeout_s)
        except TimeoutError as error:
            # A late reply would be taken for the next request's.
            _kill(process)
            raise DeadlineExceededError(
                f"The {self.name} worker did not answer within {self._timeout_s:g} s and was ended."
            ) from error
        if not line:
            raise self._gone()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise InternalError(f"{self.name} failed on this prompt: {reply['error']}")
        return reply

    def _running(self) -> Process:
        if self._process is None:
            raise UnavailableError(f"The {self.name} worker is not started; use `async with`.")
        return self._process

    def _gone(self) -> UnavailableError:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL_BYTES))
        tail = self._stderr.read().decode(errors="replace").strip()
        return UnavailableError(f"The {self.name} worker ended by itself. Its last output:\n{tail}")

    async def _stop(self, *, at_once: bool) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            if at_once:
                _kill(process)
            try:
                await asyncio.wait_for(process.wait(), _EXIT_TIMEOUT_S)
            except TimeoutError:
                _kill(process)
                await process.wait()
        self._stderr.close()


async def output_of(command: Sequence[str], standard_input: bytes = b"") -> bytes:
    """Run a program to its end and return what it prints.

    Raises:
        UnavailableError: it failed; the message has the end of what it says.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE if standard_input else DEVNULL, stdout=PIPE, stderr=PIPE, env=_environment()
    )
    try:
        output, errors = await process.communicate(standard_input or None)
    except BaseException:
        _kill(process)
        await process.wait()
        raise
    if process.returncode:
        tail = errors[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip()
        raise UnavailableError(f"`{' '.join(command[:3])}` failed:\n{tail}")
    return output


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()


def _environment() -> dict[str, str]:
    """Return the environment of a peer: idle, it spins shortly, for it must not disturb the verifier."""
    return {**os.environ, "GOMP_SPINCOUNT": spin_count(), "TOKENIZERS_PARALLELISM": "false"}

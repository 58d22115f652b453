"""The engines that answer in a run: a gateway, or a peer in another process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specdec.bench.records import Answer
from specdec.bench.workload import Prompt
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import DeadlineExceededError, InternalError, UnavailableError

TRANSFORMERS = "transformers"
"""Name of the peer: a plain `transformers` loop."""

_LINE_LIMIT_BYTES = 2**24
_STDERR_TAIL_BYTES = 2000
_EXIT_TIMEOUT_S = 10.0


class GatewayBackend:
    """One method of a gateway.

    Args:
        client: client of the gateway.
        options: the method, its K, limits and sampling.
    """

    def __init__(self, client: AsyncClient, options: GenerateOptions) -> None:
        self._client = client
        self._options = options

    async def generate(self, prompt: Prompt) -> Answer:
        """Answer a prompt, see `Backend`. The gateway measures TTFT and TPOT."""
        generation = await self._client.generate(prompt.text, self._options)
        num_tokens = len(generation.token_ids)
        return Answer(
            token_ids=generation.token_ids,
            input_tokens=generation.usage.input_tokens,
            ttft_ms=generation.timing.ttft_ms,
            tpot_ms=generation.timing.tpot_ms if num_tokens > 1 else None,
            finish_reason=generation.finish_reason,
            speculation=generation.speculation,
        )


class TransformersBackend:
    """The `transformers` worker: `async with` starts it and loads the model, and ends it.

    Args:
        model: model folder.
        dtype: data type of the weights, the same as the verifier's.
        device: device of the weights, the same as the verifier's.
        options: limits and sampling; method and K do not apply.
        timeout_s: how long the model may take to load, and a request to be answered, seconds.
    """

    def __init__(
        self, model: Path, dtype: str, device: str, options: GenerateOptions, timeout_s: float = 300.0
    ) -> None:
        flags = ["--model", str(model), "--dtype", dtype, "--device", device]
        self._command = [sys.executable, "-m", "specdec.bench.peers", *flags]
        self._options = options
        self._timeout_s = timeout_s
        self._process: Process | None = None
        # A file, not a pipe: nobody has to drain it while the worker runs.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=self._stderr,
            limit=_LINE_LIMIT_BYTES,
            env=_peer_environment(),
        )
        try:
            await self._read_reply()
        except BaseException:
            await self._stop(at_once=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop(at_once=kind is not None)

    async def generate(self, prompt: Prompt) -> Answer:
        """Answer a prompt, see `Backend`. It takes one request at a time."""
        request = {
            "prompt": prompt.text,
            "max_new_tokens": self._options.max_new_tokens,
            "temperature": self._options.sampling.temperature,
            "seed": self._options.sampling.noise_seed,
        }
        reply = await self._ask(request)
        return Answer(
            token_ids=tuple(reply["token_ids"]),
            input_tokens=reply["input_tokens"],
            ttft_ms=reply["ttft_ms"],
            tpot_ms=reply["tpot_ms"],
            finish_reason=reply["finish_reason"],
            speculation=None,
        )

    async def open_pass(self, context_token_ids: Sequence[int]) -> None:
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
                f"The transformers worker did not answer within {self._timeout_s:g} s and was ended."
            ) from error
        if not line:
            raise self._gone()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise InternalError(f"transformers failed on this prompt: {reply['error']}")
        return reply

    def _running(self) -> Process:
        if self._process is None:
            raise UnavailableError("The transformers worker is not started; use `async with`.")
        return self._process

    def _gone(self) -> UnavailableError:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL_BYTES))
        tail = self._stderr.read().decode(errors="replace").strip()
        return UnavailableError(f"The transformers worker ended by itself. Its last output:\n{tail}")

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


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()


def _peer_environment() -> dict[str, str]:
    """Give the worker all cores while it works and a short spin after: idle, it must not disturb the
    verifier."""
    num_cores = str(len(os.sched_getaffinity(0)))
    return {
        **os.environ,
        "OMP_NUM_THREADS": num_cores,
        "GOMP_SPINCOUNT": "10000",
        "TOKENIZERS_PARALLELISM": "false",
    }

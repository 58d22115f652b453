"""Which peers there are, and how each is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from specdec.bench.peers import openvino_export
from specdec.bench.peers.process import PeerBackend, output_of
from specdec.client import GenerateOptions
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.models.files import load_tokenizer, model_id, resolve_model

TRANSFORMERS, OPENVINO = "transformers", "openvino"
PEERS = (TRANSFORMERS, OPENVINO)
LOOKUP_TOKENS = 5
"""Draft tokens of a step with prompt lookup."""

_WORKERS = "specdec.bench.peers"


@dataclass(frozen=True, slots=True)
class PeerTarget:
    """What peers are to run: the model that the services run, in the same way."""

    model: str
    """The model as the command line names it."""
    model_id: str
    """The model as the services name it."""
    dtype: str
    """Data type of the weights."""
    device: str
    """Device of the weights."""


def require_usable(peers: Sequence[str]) -> None:
    """Refuse peers that cannot run here, before anything is started.

    Raises:
        InvalidArgumentError: there is no such peer.
        FailedPreconditionError: its environment was not made.
    """
    require_known(peers)
    if OPENVINO in peers:
        openvino_export.program("python")


def require_known(peers: Sequence[str]) -> None:
    """Refuse names that no peer has.

    Raises:
        InvalidArgumentError: there is no such peer.
    """
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise InvalidArgumentError(f"There is no peer {unknown[0]!r}; there are {' and '.join(PEERS)}.")


def names_of(peers: Sequence[str]) -> list[str]:
    """Return the names in the results: each peer plain, then with prompt lookup."""
    return [name for peer in peers for name in (peer, f"{peer}-lookup")]


class PeerSetup:
    """Starts the workers of peers.

    Args:
        target: what they are to run.
        report: receives a line of text before a slow step.

    Raises:
        FailedPreconditionError: the services run another model than the peers would load.
    """

    def __init__(self, target: PeerTarget, report: Callable[[str], None] = lambda _: None) -> None:
        if model_id(target.model) != target.model_id:
            raise FailedPreconditionError(
                f"The services run {target.model_id}, but the peers would load {model_id(target.model)}; "
                "name the services' model with --model."
            )
        self._target = target
        self._report = report
        self._folder = resolve_model(target.model)
        self._threads = 0

    async def encode(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of prompts in the chat template; every engine gets these.

        Raises:
            NotFoundError: the model has no tokenizer.
            UnavailableError: the model has no chat template, or transformers is not installed.
        """
        if prompts:
            load_tokenizer(self._folder)  # refuses in words what the program below refuses by a traceback
        command = [sys.executable, "-m", f"{_WORKERS}.encode", str(self._folder)]
        output = json.loads(await output_of(command, json.dumps(list(prompts)).encode()))
        self._threads = output["threads"]
        return [tuple(token_ids) for token_ids in output["token_ids"]]

    async def start_answering(
        self, peers: Sequence[str], options: GenerateOptions, stack: AsyncExitStack
    ) -> list[PeerBackend]:
        """Start what answers prompts: each peer plain, and with prompt lookup. The stack ends it."""
        commands = [await self._command(peer) for peer in peers]
        lookup = ["--lookup-tokens", str(LOOKUP_TOKENS)]
        made = [arguments for command in commands for arguments in (command, [*command, *lookup])]
        return await self._start(names_of(peers), made, options, stack)

    async def start_passes(self, peers: Sequence[str], stack: AsyncExitStack) -> list[PeerBackend]:
        """Start what runs passes, one worker for each peer. The stack ends it."""
        commands = [[*await self._command(peer), "--passes"] for peer in peers]
        return await self._start(peers, commands, GenerateOptions(), stack)

    async def _start(
        self,
        names: Sequence[str],
        commands: Sequence[list[str]],
        options: GenerateOptions,
        stack: AsyncExitStack,
    ) -> list[PeerBackend]:
        backends = [PeerBackend(*started, options) for started in zip(names, commands, strict=True)]
        for backend in backends:
            self._report(f"Starting {backend.name}")
            await stack.enter_async_context(backend)
            if (precision := backend.description["precision"]) != self._target.dtype:
                self._report(
                    f"{backend.name} computes in {precision}, for this CPU has no kernels for "
                    f"{self._target.dtype}."
                )
        return backends

    async def _command(self, peer: str) -> list[str]:
        if peer == OPENVINO:
            own = ["--model", str(await self._exported())]
            worker = [str(openvino_export.program("python")), "-m", f"{_WORKERS}.openvino_worker"]
        else:
            own = ["--model", str(self._folder), "--device", self._target.device]
            worker = [sys.executable, "-m", f"{_WORKERS}.transformers_worker"]
        if not self._threads:
            await self.encode([])
        return [*worker, *own, "--dtype", self._target.dtype, "--threads", str(self._threads)]

    async def _exported(self) -> Path:
        target = self._target
        if target.device != "cpu" or target.dtype not in openvino_export.WEIGHT_FORMATS:
            raise FailedPreconditionError(
                f"openvino runs on the CPU in {', '.join(openvino_export.WEIGHT_FORMATS)}; the services run "
                f"on {target.device} in {target.dtype}. Leave openvino out of --peers."
            )
        return await openvino_export.exported(self._folder, target.model_id, target.dtype, self._report)

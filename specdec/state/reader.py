"""The drafter's side of target state: map what is on this host or GPU, mirror the rest from a stream.

A drafter gets the same view either way.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.contract.target_state import (
    GENERATIONS,
    StateStorage,
    TargetStateRef,
    TargetStateSpec,
    storage_kind,
)
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.state_files import StateFiles
from specdec.state.mirror import MirrorBudget, MirroredState
from specdec.state.source import MappedState, Mappings, StateSource
from specdec.state.verifier_peers import VerifierPeers
from specdec.state.view import Projection, TargetStateView
from specdec.state.weights import TargetWeights
from specdec.transport.allow_list import LOCAL, AllowList
from specdec.transport.tls import OutgoingTls

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Link:
    """How a session reads the state of its verifier."""

    verifier_uri: str
    storage: StateStorage
    fallback_reason: str = ""
    """Why it is streamed though a handle was offered."""


@dataclass(frozen=True, slots=True)
class ReaderConfig:
    """What a reader may do.

    Args:
        mode: "auto", "handle" or "stream".
        device: the drafter's.
        directory: where handles may be; None: nowhere.
        mirror_bytes: memory of all mirrors together.
        stream_projected: have the verifier project hidden states it streams, where the spec has a projection.
        verifier_allow: addresses of verifiers that may be called; see AllowList.
        timeout_s: how long a verifier may take to answer, or to stream what a round waits for, seconds.
    """

    mode: str
    device: torch.device
    directory: StateFiles | None
    mirror_bytes: int
    stream_projected: bool = True
    verifier_allow: str = LOCAL
    timeout_s: float = 60.0


class StateReader:
    """Reads the state of many sessions, of any verifier. Used from one event loop.

    Args:
        checkpoint: reads the target's weights, once they are wanted because a verifier's own cannot be
            mapped; None: there are none. It is called one call at a time, and remembers what it has read.
        tls: credentials for verifiers; None: no encryption.
        on_link: called for every session that begins to read.
    """

    def __init__(
        self,
        config: ReaderConfig,
        checkpoint: Callable[[], TargetWeights] | None = None,
        on_link: Callable[[Link], None] = lambda link: None,
        *,
        tls: OutgoingTls | None = None,
    ) -> None:
        self.config = config
        self._on_link = on_link
        self.mirrors = MirrorBudget(config.mirror_bytes)
        self._mappings = Mappings(config.device, config.directory)
        may_map = config.mode != "stream"
        self._verifiers = VerifierPeers(
            self._mappings if may_map else None,
            checkpoint,
            tls,
            allowed=AllowList(config.verifier_allow),
            timeout_s=config.timeout_s,
        )
        self._links: Counter[Link] = Counter()

    @property
    def links(self) -> Sequence[tuple[Link, int]]:
        """Links in use and the sessions on each."""
        return [(link, count) for link, count in self._links.items() if count]

    def open(
        self, spec: TargetStateSpec, max_length: int, projection: Projection | None = None
    ) -> StateSession:
        """Follow a session; nothing is mapped or streamed before its first handle is there.

        Args:
            max_length: positions the session can reach.
            projection: the spec's, if it has one.
        """
        return StateSession(self, spec, max_length, projection)

    async def close(self) -> None:
        """Close what is left open."""
        self._mappings.close()
        await self._verifiers.close()

    async def weights(self, verifier_uri: str) -> TargetWeights:
        """Return a target's embedding and LM head; see VerifierPeers."""
        return await self._verifiers.weights(verifier_uri)

    async def attach(
        self, ref: TargetStateRef, spec: TargetStateSpec, max_length: int, projection: Projection | None
    ) -> tuple[Link, StateSource]:
        """Map a session's state, or start to mirror it; the link counts until it is released.

        Raises:
            FailedPreconditionError: it can only be streamed, and handles are demanded.
            PermissionDeniedError: it can only be streamed, and the verifier may not be called.
            ResourceExhaustedError: no memory for another mirror.
        """
        mode, reason = self.config.mode, ""
        source: StateSource | None = None
        if mode != "stream":
            source, reason = self._try_to_map(ref, spec, projection)
        if source is None and mode == "handle":
            raise FailedPreconditionError(
                f"The target state cannot be mapped ({reason}), and --target-state is handle.",
                reason="STATE_NOT_MAPPED",
            )
        storage = StateStorage.STREAM
        if not any(tensor.storage for tensor in ref.tensors if tensor.name != GENERATIONS):
            reason = ""  # no handle was offered that could have failed
        if source:
            storage = storage_kind(next(ref.storage for ref in ref.tensors if ref.name != GENERATIONS))
        else:
            source = await self._mirror(ref, spec, max_length, projection)
        link = Link(ref.verifier_uri, storage, reason)
        if reason and not self._links[link]:
            logger.warning("target state is streamed", extra={"verifier": ref.verifier_uri, "reason": reason})
        self._links[link] += 1
        self._on_link(link)
        return link, source

    def _try_to_map(
        self, ref: TargetStateRef, spec: TargetStateSpec, projection: Projection | None
    ) -> tuple[StateSource | None, str]:
        """Return the state where it lies; or None, and why not."""
        if reason := self._mappings.why_not(ref.tensors):
            return None, reason
        try:
            return MappedState(self._mappings, ref, spec, projection), ""
        except FailedPreconditionError as error:
            if error.reason == "STALE_STATE":
                raise
            return None, error.message
        except (OSError, ValueError, TypeError, OverflowError, RuntimeError) as error:
            return None, f"{type(error).__name__}: {error}"

    async def _mirror(
        self, ref: TargetStateRef, spec: TargetStateSpec, max_length: int, projection: Projection | None
    ) -> StateSource:
        return MirroredState(
            await self._verifiers.stub(ref.verifier_uri),
            self.mirrors,
            ref,
            spec,
            max_length,
            device=self.config.device,
            timeout_s=self.config.timeout_s,
            projection=projection,
            is_projected=(
                self.config.stream_projected
                and projection is not None
                and ref.projection_sha256 == projection.info.sha256
            ),
        )

    async def release(self, link: Link) -> None:
        """Note that a session on that link has ended."""
        self._links[link] -= 1
        if not self._links[link]:
            del self._links[link]
        if self._mappings.sweep():
            self._verifiers.forget_weights()
        await self._verifiers.close_idle({used.verifier_uri for used in self._links})


class StateSession:
    """One session's state as its drafter follows it."""

    def __init__(
        self, reader: StateReader, spec: TargetStateSpec, max_length: int, projection: Projection | None
    ) -> None:
        self.link: Link | None = None
        """How the state is read; None until the first handle came."""
        self._reader = reader
        self._spec = spec
        self._max_length = max_length
        self._projection = projection
        self._source: StateSource | None = None
        self._length = 0
        self._num_new_bytes = 0
        self._identity: tuple[str, int] | None = None

    async def view(self, ref: TargetStateRef) -> TargetStateView:
        """Return the state a handle gives access to; wait until it is here.

        Raises:
            FailedPreconditionError: a handle of another session, of one that has ended, or whose blocks do
                not follow those of earlier handles.
            UnavailableError: the stream of state broke.
            InvalidArgumentError: positions past the session's end.
        """
        identity = (ref.session_id, ref.generation)
        if self._identity is None:
            if not ref.tensors or not ref.block_ids or ref.block_tokens != BLOCK_TOKENS:
                raise FailedPreconditionError(
                    f"A session's first handle must list its tensors and blocks of {BLOCK_TOKENS} tokens.",
                    reason="INCOMPLETE_HANDLE",
                )
            _check_complete(ref, self._spec)
            self.link, self._source = await self._reader.attach(
                ref, self._spec, self._max_length, self._projection
            )
            self._identity = identity
        if identity != self._identity:
            raise FailedPreconditionError(
                "The handle is of another session or generation.", reason="STALE_STATE"
            )
        assert self._source is not None
        if ref.num_known_blocks:
            self._source.add_blocks(ref.num_known_blocks, ref.block_ids)
        if ref.cached_length > self._max_length:
            raise InvalidArgumentError(
                f"The handle is of {ref.cached_length} positions, the session was opened with "
                f"{self._max_length}.",
                field="target_state",
            )
        self._source.check()
        view = await self._source.view(ref)
        self._num_new_bytes += (ref.cached_length - self._length) * self._source.row_bytes
        self._length = ref.cached_length
        return view

    @property
    def num_reserved_bytes(self) -> int:
        """Memory that is reserved for the mirror of the state; 0: there is no mirror."""
        return self._source.num_reserved_bytes if self._source else 0

    def take_num_new_bytes(self) -> int:
        """Return the bytes of state that became readable since the last call."""
        num_bytes, self._num_new_bytes = self._num_new_bytes, 0
        return num_bytes

    def check(self) -> None:
        """Check that what was read in this round was still the session's.

        Raises:
            FailedPreconditionError: the session has ended; what was read may be another's.
        """
        if self._source:
            self._source.check()

    @property
    def is_behind(self) -> bool:
        """Whether the text has got on so far that what was read in this round is worth nothing."""
        return self._source is not None and self._source.is_behind

    async def close(self) -> None:
        """Unmap, or end the stream."""
        source, self._source = self._source, None
        if source:
            await source.close()
        if self.link:
            await self._reader.release(self.link)
            self.link = None


def _check_complete(ref: TargetStateRef, spec: TargetStateSpec) -> None:
    """Refuse a handle without what the spec names.

    Raises:
        FailedPreconditionError: naming what is missing.
    """
    missing = sorted(set(spec.read_of(ref.tensors)) - {tensor.name for tensor in ref.tensors})
    if spec.kv_last_of_each_attention_type and not any(tensor.attention_type for tensor in ref.tensors):
        missing.append("kv")
    if missing:
        raise FailedPreconditionError(
            f"The handle lacks {', '.join(missing)}, which the drafter reads.", reason="INCOMPLETE_HANDLE"
        )

"""The handle on a session's target state that a gateway passes from the verifier to the drafters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from specdec.v1 import target_state_pb2, verifier_pb2


@dataclass(frozen=True, slots=True)
class RemoteState:
    """Handle on a session's target state, as its verifier gave it out."""

    opened: target_state_pb2.TargetStateRef | None
    """The reference with all tensors, as of the opening; None: the session does not export its state."""
    cached_length: int
    """Positions that may be read."""
    added_block_ids: tuple[int, ...] = ()
    """The blocks that the session took since."""
    window: target_state_pb2.WindowBlocks | None = None
    """Where layers with sliding attention have its last positions, as of the last answer; None: where the
    opening said."""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Why the session does not export what a drafter reads, by the drafter's name."""

    @property
    def session_id(self) -> str:
        """Id of the verifier's session; empty: it does not export its state."""
        return self.opened.session_id if self.opened else ""

    @property
    def num_blocks(self) -> int:
        """How many blocks the session has."""
        return len(self.opened.block_ids) + len(self.added_block_ids) if self.opened else 0

    def after(self, result: verifier_pb2.VerifyResult) -> RemoteState:
        """Return the handle as of a round's answer."""
        return replace(
            self,
            cached_length=result.cached_length,
            added_block_ids=(*self.added_block_ids, *result.target_state.block_ids),
            window=result.target_state.window if result.target_state.HasField("window") else self.window,
        )

    def message(self, *, num_known_blocks: int) -> target_state_pb2.TargetStateRef | None:
        """Return the message that a drafter is sent.

        Args:
            num_known_blocks: how many blocks of the session the drafter was told of; 0: it knows nothing yet.
        """
        if self.opened is None:
            return None
        if not num_known_blocks:
            message = target_state_pb2.TargetStateRef()
            message.CopyFrom(self.opened)
            message.block_ids.extend(self.added_block_ids)
            message.cached_length = self.cached_length
            if self.window:
                message.window.CopyFrom(self.window)
            return message
        added = self.added_block_ids[num_known_blocks - len(self.opened.block_ids) :]
        return target_state_pb2.TargetStateRef(
            session_id=self.opened.session_id,
            verifier_uri=self.opened.verifier_uri,
            generation=self.opened.generation,
            cached_length=self.cached_length,
            block_ids=added,
            num_known_blocks=num_known_blocks if added else 0,
            window=self.window or (self.opened.window if self.opened.HasField("window") else None),
        )

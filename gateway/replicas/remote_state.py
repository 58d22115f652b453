"""The handle on a session's target state that a gateway passes from the verifier to the drafters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from specdec.v1 import target_state_pb2


@dataclass(frozen=True, slots=True)
class RemoteState:
    """Handle on a session's target state, as its verifier gave it out."""

    opened: target_state_pb2.TargetStateRef | None
    """The reference with all tensors, as of the opening; None: the session does not export its state."""
    cached_length: int
    """Positions that may be read."""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Why the session does not export what a drafter reads, by the drafter's name."""

    @property
    def session_id(self) -> str:
        """Id of the verifier's session; empty: it does not export its state."""
        return self.opened.session_id if self.opened else ""

    def message(self, *, with_tensors: bool) -> target_state_pb2.TargetStateRef | None:
        """Return the message that a drafter is sent."""
        if self.opened is None:
            return None
        if with_tensors:
            message = target_state_pb2.TargetStateRef()
            message.CopyFrom(self.opened)
            message.cached_length = self.cached_length
            return message
        return target_state_pb2.TargetStateRef(
            session_id=self.opened.session_id,
            verifier_uri=self.opened.verifier_uri,
            generation=self.opened.generation,
            cached_length=self.cached_length,
        )

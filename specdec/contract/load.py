"""How busy a replica is, as it says so itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from specdec.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class Load:
    """The sessions of all gateways on a replica, and the room that is left; see specdec.v1.Load."""

    num_sessions: int = 0
    """Open sessions."""
    max_sessions: int = 0
    """Most sessions at a time; 0: there is no limit."""
    num_waiting: int = 0
    """Work items that wait for the model."""
    kv_capacity_tokens: int = 0
    """Tokens that the KV pool holds; 0: sessions take no KV."""
    kv_free_tokens: int = 0
    """Tokens of the pool that no session has reserved."""

    @classmethod
    def from_proto(cls, message: common_pb2.Load) -> Load:
        """Return the load of a message."""
        return cls(
            num_sessions=message.num_sessions,
            max_sessions=message.max_sessions,
            num_waiting=message.num_waiting,
            kv_capacity_tokens=message.kv_capacity_tokens,
            kv_free_tokens=message.kv_free_tokens,
        )

    def to_proto(self) -> common_pb2.Load:
        """Return the message."""
        return common_pb2.Load(
            num_sessions=self.num_sessions,
            max_sessions=self.max_sessions,
            num_waiting=self.num_waiting,
            kv_capacity_tokens=self.kv_capacity_tokens,
            kv_free_tokens=self.kv_free_tokens,
        )

    @property
    def kv_share(self) -> float:
        """The share of the pool that sessions have reserved, 0 to 1, whatever a replica says."""
        if not self.kv_capacity_tokens:
            return 0.0
        return max(0.0, 1 - self.kv_free_tokens / self.kv_capacity_tokens)

    @property
    def num_taken(self) -> float:
        """The session slots that are taken. Where KV is scarcer than slots, its share of them counts: a long
        session takes the room of several.
        """
        return max(self.num_sessions, self.max_sessions * self.kv_share)


def scarcest(pools: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the capacity and the free tokens of the pool with the smallest share free; zeros: there is none.

    Args:
        pools: capacity and free tokens of each.
    """
    return min(pools, key=lambda pool: pool[1] / pool[0], default=(0, 0))

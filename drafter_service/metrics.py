"""The metrics of a drafter service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.metrics import Meter

from specdec.service.instruments import Counter, EngineMetrics, observe_values

if TYPE_CHECKING:
    from drafter_service.host import DrafterHost
    from specdec.state.reader import Link


class DrafterMetrics:
    """Counters of drafts and of target state, and gauges of a host. docs/metrics.md explains each."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.engine = EngineMetrics(meter, "specdec.drafter")
        self._rounds = Counter(
            meter, "specdec.drafter.rounds", "method", unit="{round}", description="Drafts answered"
        )
        self._state_sessions = Counter(
            meter,
            "specdec.drafter.state_sessions",
            "storage",
            "is_fallback",
            unit="{session}",
            description="Sessions that read target state",
        )
        self._state_bytes = Counter(
            meter,
            "specdec.drafter.target_state",
            "storage",
            unit="By",
            description="Target state read, by storage",
        )

    def observe(self, host: DrafterHost) -> None:
        """Report the load of a host whenever metrics are collected."""
        self.engine.observe_queue(lambda: host.num_waiting)
        self.engine.observe_sessions(lambda: host.num_sessions, host.config.max_sessions)
        pools = {name: drafter.kv_pool for name, drafter in host.drafters.items() if drafter.kv_pool}
        observe_values(
            self._meter,
            "specdec.drafter.kv_used_tokens",
            lambda: {name: pool.capacity_tokens - pool.free_tokens for name, pool in pools.items()},
            label="drafter",
            unit="{token}",
            description="Tokens of a drafter's own KV that sessions hold",
        )
        observe_values(
            self._meter,
            "specdec.drafter.kv_capacity_tokens",
            lambda: {name: pool.capacity_tokens for name, pool in pools.items()},
            label="drafter",
            unit="{token}",
            description="Tokens of a drafter's own KV in all",
        )

    def add_round(self, drafter: str) -> None:
        """Count a draft that was answered."""
        self._rounds.add(1, drafter)

    def add_state_bytes(self, storage: str, num_bytes: int) -> None:
        """Count target state that was read."""
        self._state_bytes.add(num_bytes, storage)

    def add_link(self, link: Link) -> None:
        """Count a session that begins to read target state."""
        self._state_sessions.add(1, link.storage.value, bool(link.fallback_reason))

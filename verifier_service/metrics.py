"""The metrics of a verifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.metrics import Meter

from specdec.service.instruments import Counter, EngineMetrics, observe_value, observe_values

if TYPE_CHECKING:
    from verifier_service.verifier import Verifier


class VerifierMetrics:
    """Counters, and the gauges that `observe` adds for a loaded verifier; docs/metrics.md explains each."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.engine = EngineMetrics(meter, "specdec.verifier")
        self.rounds = Counter(
            meter, "specdec.verifier.rounds", unit="{round}", description="Verify passes answered"
        )
        self.reused_tokens = Counter(
            meter,
            "specdec.verifier.reused_tokens",
            unit="{token}",
            description="Prompt tokens that needed no pass, because an earlier text began with them",
        )
        self.preempted_sessions = Counter(
            meter,
            "specdec.verifier.preempted_sessions",
            unit="{session}",
            description="Sessions that ended before their time, because older ones needed their KV",
        )
        self.state_bytes = Counter(
            meter,
            "specdec.verifier.streamed_state",
            unit="By",
            description="Target state sent to drafters",
        )

    def observe(self, verifier: Verifier) -> None:
        """Report the load of a verifier whenever metrics are collected."""
        self.engine.observe_queue(lambda: verifier.num_waiting)
        self.engine.observe_sessions(lambda: verifier.num_sessions, verifier.config.max_sessions)
        observe_values(
            self._meter,
            "specdec.verifier.model_impl",
            lambda: {verifier.model_impl: 1},
            label="model_impl",
            unit="{model}",
            description="Whose code computes a pass: specdec, or transformers, which is slower",
        )
        pool = verifier.pool
        observe_value(
            self._meter,
            "specdec.verifier.kv_used_tokens",
            lambda: pool.capacity_tokens - pool.free_tokens,
            unit="{token}",
            description="Tokens of KV that sessions hold",
        )
        observe_value(
            self._meter,
            "specdec.verifier.kv_kept_tokens",
            lambda: pool.kept_tokens,
            unit="{token}",
            description="Tokens of KV that no session holds, kept for prompts that begin alike",
        )
        observe_value(
            self._meter,
            "specdec.verifier.kv_capacity_tokens",
            lambda: pool.capacity_tokens,
            unit="{token}",
            description="Tokens of KV in all",
        )

"""The metrics of a verifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from opentelemetry.metrics import Meter

from specdec.runtime.block_group import BlockGroup
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.service.instruments import Counter, EngineMetrics, observe_values

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
        for name, num_blocks, description in (
            ("specdec.verifier.kv_used_tokens", _num_used, "Tokens of KV that sessions hold"),
            (
                "specdec.verifier.kv_kept_tokens",
                _num_kept,
                "Tokens of KV that no session holds, kept for prompts that begin alike",
            ),
            ("specdec.verifier.kv_capacity_tokens", _num_blocks, "Tokens of KV in all"),
        ):
            observe_values(
                self._meter,
                name,
                partial(_tokens, verifier.pool, num_blocks),
                label="layers",
                unit="{token}",
                description=description,
            )


def _tokens(pool: KvPool, num_blocks: Callable[[BlockGroup], int]) -> dict[str, int]:
    """Return tokens of each kind of layers that has blocks of its own."""
    return {name: num_blocks(group) * BLOCK_TOKENS for name, group in pool.groups.items()}


def _num_used(group: BlockGroup) -> int:
    return group.num_blocks - group.num_available


def _num_kept(group: BlockGroup) -> int:
    return group.prefixes.num_idle


def _num_blocks(group: BlockGroup) -> int:
    return group.num_blocks

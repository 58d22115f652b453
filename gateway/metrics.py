"""The counters of all requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.metrics import Histogram, Meter

from gateway.rounds.vocabulary import Round
from specdec.contract.errors import SpecdecError, status_code
from specdec.service.instruments import SHORT_TIMES_S, Counter, observe_value, observe_values
from specdec.v1 import gateway_pb2

OTHER = "other"
"""Label of methods and drafters that none of the known services offers: clients cannot make up series."""

# Bucket boundaries as the OpenTelemetry semantic conventions of GenAI metrics give them, seconds.
_REQUEST_DURATIONS_S = tuple(0.01 * 2**exponent for exponent in range(14))
_FIRST_TOKEN_TIMES_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_WAITS_S = (0.001, *_REQUEST_DURATIONS_S, 163.84, 327.68, 655.36)
_TOKEN_TIMES_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


def outcome_of(error: Exception) -> str:
    """Return how a failed request is counted: by its status code, which is INTERNAL for a defect."""
    return status_code(error).name.lower() if isinstance(error, SpecdecError) else "internal"


class GatewayMetrics:
    """Counters, not ratios: rates and means are for whoever reads them. docs/metrics.md explains each.

    Labels are bounded: a `method` is one that is offered, or OTHER; a `position` is less than the verifier's
    most draft tokens; a `reason` or `outcome` is one of a few codes.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._requests = Counter(meter, "specdec.requests", "method", "outcome", unit="{request}")
        self._failovers = Counter(
            meter,
            "specdec.failovers",
            "method",
            unit="{failover}",
            description="Verifiers lost in mid-generation",
        )
        self._preemptions = Counter(
            meter,
            "specdec.preemptions",
            "method",
            unit="{preemption}",
            description="Sessions that a verifier ended, because it needed their KV for older ones",
        )
        self._rounds = Counter(meter, "specdec.rounds", "method", unit="{round}")
        self._fallback_rounds = Counter(
            meter,
            "specdec.fallback_rounds",
            "method",
            "reason",
            unit="{round}",
            description="Rounds whose draft is missing, by reason",
        )
        self._count_drafting(meter)
        self._count_proposers(meter)
        self._phase = self._times("specdec.round.phase_duration", SHORT_TIMES_S)
        self._duration = self._times("gen_ai.server.request.duration", _REQUEST_DURATIONS_S)
        self._ttft = self._times("gen_ai.server.time_to_first_token", _FIRST_TOKEN_TIMES_S)
        self._tpot = self._times("gen_ai.server.time_per_output_token", _TOKEN_TIMES_S)
        self._waits = self._times("specdec.gateway.waiting_duration", _WAITS_S)

    def _count_drafting(self, meter: Meter) -> None:
        self._drafts = Counter(meter, "specdec.drafts", "method", unit="{draft}")
        self._draft_tokens = Counter(meter, "specdec.draft_tokens", "method", unit="{token}")
        self._accepted_tokens = Counter(meter, "specdec.accepted_tokens", "method", unit="{token}")
        self._drafted_per_position = Counter(
            meter,
            "specdec.draft_tokens_per_position",
            "method",
            "position",
            unit="{draft}",
            description="Drafts that reach a position",
        )
        self._accepted_per_position = Counter(
            meter, "specdec.accepted_tokens_per_position", "method", "position", unit="{token}"
        )

    def _count_proposers(self, meter: Meter) -> None:
        self._proposed_tokens = Counter(
            meter, "specdec.proposer.draft_tokens", "method", "drafter", unit="{token}"
        )
        self._won_tokens = Counter(
            meter, "specdec.proposer.accepted_tokens", "method", "drafter", unit="{token}"
        )
        self._missed_rounds = Counter(
            meter, "specdec.proposer.fallback_rounds", "method", "drafter", "reason", unit="{round}"
        )

    def _times(self, name: str, boundaries_s: tuple[float, ...]) -> Histogram:
        return self._meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=boundaries_s)

    def observe(
        self,
        *,
        num_requests: Callable[[], int],
        max_requests: int,
        num_waiting: Callable[[], int],
        num_ready_replicas: Callable[[], Mapping[str, int]],
    ) -> None:
        """Report the load whenever metrics are collected.

        Args:
            num_ready_replicas: by service, "verifier" and "drafter".
        """
        observe_value(
            self._meter,
            "specdec.gateway.running_requests",
            num_requests,
            unit="{request}",
            description="Requests that run",
        )
        observe_value(
            self._meter,
            "specdec.gateway.max_requests",
            lambda: max_requests,
            unit="{request}",
            description="Most requests that run at a time",
        )
        observe_value(
            self._meter,
            "specdec.gateway.waiting_requests",
            num_waiting,
            unit="{request}",
            description="Requests that wait for room",
        )
        observe_values(
            self._meter,
            "specdec.gateway.ready_replicas",
            num_ready_replicas,
            label="service",
            unit="{replica}",
            description="Replicas that are ready, by service",
        )

    def add_round(self, method: str, completed: Round) -> None:
        """Count a round after the prefill."""
        if completed.is_prefill:
            return
        self._rounds.add(1, method)
        for phase, duration_ns in completed.phases_ns.items():
            self._phase.record(duration_ns / 1e9, {"method": method, "phase": phase})
        if completed.draft.fallback_reason:
            self._fallback_rounds.add(1, method, completed.draft.fallback_code)
        if completed.draft.token_ids:
            self._add_draft(method, completed)
        self._add_proposals(method, completed)

    def _add_draft(self, method: str, completed: Round) -> None:
        self._drafts.add(1, method)
        self._draft_tokens.add(len(completed.draft.token_ids), method)
        self._accepted_tokens.add(completed.verified.num_accepted_tokens, method)
        for position in range(completed.draft.tree.depth):
            self._drafted_per_position.add(1, method, position)
        for position in range(completed.verified.num_accepted_tokens):
            self._accepted_per_position.add(1, method, position)

    def _add_proposals(self, method: str, completed: Round) -> None:
        for proposal in completed.draft.proposals:
            drafter = OTHER if method == OTHER else proposal.drafter
            self._proposed_tokens.add(len(proposal.nodes), method, drafter)
            self._won_tokens.add(len(proposal.nodes.intersection(completed.verified.path)), method, drafter)
            if proposal.fallback_reason:
                self._missed_rounds.add(1, method, drafter, proposal.fallback_code)

    def add_failover(self, method: str) -> None:
        """Count a verifier that was lost in mid-generation."""
        self._failovers.add(1, method)

    def add_preemption(self, method: str) -> None:
        """Count a session that a verifier ended because older ones needed its room."""
        self._preemptions.add(1, method)

    def add_wait(self, waited_s: float) -> None:
        """Record how long a request waited for room, whether it got it or not."""
        self._waits.record(waited_s)

    @contextmanager
    def counting_refusals(self, method: str = "") -> Iterator[None]:
        """Count a request that ends in the block, before it runs; it has an empty label until its method is
        settled."""
        try:
            yield
        except asyncio.CancelledError:
            self._requests.add(1, method, "cancelled")
            raise
        except Exception as error:
            self._requests.add(1, method, outcome_of(error))
            raise

    def add_request(
        self, model_id: str, method: str, outcome: str, timing: gateway_pb2.GenerateTiming
    ) -> None:
        """Count a request that ended, `outcome` its finish reason or its error's status code."""
        labels = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "specdec",
            "gen_ai.request.model": model_id,
        }
        self._requests.add(1, method, outcome)
        self._duration.record(timing.total_ns / 1e9, labels)
        if timing.ttft_ns:
            self._ttft.record(timing.ttft_ns / 1e9, labels)
        if timing.tpot_ns:
            self._tpot.record(timing.tpot_ns / 1e9, labels)

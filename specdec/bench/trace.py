"""Traces of what drafts cost and bring, on which a choice among methods and sizes can be replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from specdec.bench.records import METHOD_SEPARATOR, NODES_SEPARATOR, Answer, RequestRecord
from specdec.client import Speculation, Token
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import PLAIN

TRACE_FILE = "trace.json"


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """The mean round of a typical answer, for a method and size at one number of requests under way; times in
    milliseconds.
    """

    draft_ms: float
    """The drafter's time."""
    verify_ms: float
    """The verifier's time, the wait for a pass included."""
    transport_ms: float
    """Time on the wire and in gRPC, to both services."""
    num_draft_tokens: float
    gateway_ms: float = 0.0
    """The gateway's own time."""


@dataclass(frozen=True, slots=True)
class PromptTrace:
    """A prompt, and what plain decoding took to its first token at the least number of requests under way."""

    input_tokens: int
    ttft_ms: float


@dataclass(slots=True)
class ArmTrace:
    """One method with one size."""

    method: str
    draft_depth: int
    """K; 0: plain decoding."""
    draft_nodes: int
    """Most tokens of a tree; 0: chains."""
    costs: dict[int, RoundCosts] = field(default_factory=dict)
    """By the number of requests under way."""
    accepted: list[list[int]] = field(default_factory=list)
    """Of each prompt, how many draft tokens each round accepted; all arms have the same texts."""


@dataclass(slots=True)
class Trace:
    """What a run measured of every method and size."""

    provenance: dict[str, Any]
    arms: list[ArmTrace]
    prompts: list[PromptTrace] = field(default_factory=list)
    """In the order of what the arms accepted; empty: the trace is older than this."""

    def write(self, path: Path) -> None:
        """Write the trace as JSON."""
        path.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what `write` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        arms = [
            ArmTrace(
                **{
                    **arm,
                    "costs": {int(number): RoundCosts(**costs) for number, costs in arm["costs"].items()},
                }
            )
            for arm in document["arms"]
        ]
        prompts = [PromptTrace(**prompt) for prompt in document.get("prompts", ())]
        return cls(document["provenance"], arms, prompts)


def accepted_by_round(tokens: Iterable[Token]) -> tuple[int, ...]:
    """Return how many draft tokens each round after the prefill accepted, from who made each token."""
    counts, accepted = [], 0
    for token in tokens:
        if token.is_draft:
            accepted += 1
        else:
            counts.append(accepted)
            accepted = 0
    return tuple(counts[1:])


def make_trace(provenance: dict[str, Any], records: Sequence[RequestRecord]) -> Trace:
    """Make a trace of a run whose methods are named METHOD/NODES@K.

    Raises:
        InvalidArgumentError: a request failed, or its rounds are not known.
    """
    arms: dict[str, ArmTrace] = {}
    prompts: list[PromptTrace] = []
    least = min(record.concurrency for record in records)
    for name in dict.fromkeys(record.method for record in records):
        arm = arms[name] = _arm(name)
        for concurrency in sorted({record.concurrency for record in records}):
            of_arm = [each for each in records if (each.method, each.concurrency) == (name, concurrency)]
            arm.costs[concurrency] = _typical([_speculation(record) for record in of_arm])
            if concurrency == least:
                arm.accepted = [list(_answer(record).accepted) for record in of_arm]
                if name == PLAIN:
                    prompts = [_prompt(_answer(record)) for record in of_arm]
    return Trace(provenance, list(arms.values()), prompts)


def _arm(name: str) -> ArmTrace:
    if name == PLAIN:
        return ArmTrace(PLAIN, 0, 0)
    rest, _, depth = name.partition(METHOD_SEPARATOR)
    method, _, nodes = rest.partition(NODES_SEPARATOR)
    return ArmTrace(method, int(depth), int(nodes))


def _answer(record: RequestRecord) -> Answer:
    if record.answer is None:
        raise InvalidArgumentError(
            f"A request of {record.method} failed, so there is no trace: {record.error}"
        )
    return record.answer


def _speculation(record: RequestRecord) -> Speculation:
    speculation = _answer(record).speculation
    assert speculation is not None, "answers of a gateway have rounds"
    return speculation


def _prompt(answer: Answer) -> PromptTrace:
    return PromptTrace(answer.input_tokens, answer.ttft_ms)


def _typical(answers: Sequence[Speculation]) -> RoundCosts:
    """Return the median over the answers of what their mean rounds take: a stall of the machine is in few."""

    def per_round(total: Callable[[Speculation], float]) -> float:
        return median(total(answer) / max(1, answer.num_rounds) for answer in answers)

    num_rounds = max(1, sum(answer.num_rounds for answer in answers))
    return RoundCosts(
        per_round(lambda answer: answer.draft_ms),
        per_round(lambda answer: answer.verify_ms),
        per_round(lambda answer: answer.transport_ms),
        sum(answer.num_draft_tokens for answer in answers) / num_rounds,
        per_round(lambda answer: answer.gateway_ms),
    )

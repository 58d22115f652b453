"""Counters equal the sums of what every single request says it did, however it ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_trace_id

from gateway.metrics import OTHER
from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from specdec.contract.methods import drafters_of, method_of
from specdec.contract.sampling import SamplingParams
from specdec.service.exporters import make_telemetry
from tests.exposition import make_broken
from tests.integration.gated_drafter import eventually, eventually_offers
from tests.systems import FAMILIES, System, running_gateway, running_system, running_verifier
from tests.tiny_models import VOCAB_SIZE
from tests.unit.test_stats import points

PROMPTS = ([5, 6, 7, 5, 6, 7, 5, 6], [40, 41, 42, 40, 41])
BASE = GenerateOptions(draft_depth=3, max_new_tokens=30, ignore_eos=True)
TREE = replace(BASE, draft_nodes=8)
FINISHED = [
    *(replace(BASE, method=method) for method in ("none", "ngram", "noisy", "broken")),
    *(replace(BASE, method=method) for method in ("noisy+ngram", "ngram+noisy", "broken+ngram")),
    *(replace(TREE, method=method) for method in ("ngram", "ngram+noisy")),
    replace(BASE, method="noisy", sampling=SamplingParams(temperature=0.8, seed=3)),
    replace(BASE, method="noisy", draft_depth=None),
]
CHOSEN = replace(BASE, method="noisy", max_new_tokens=400)
"""One that is cancelled, or loses its verifier, in mid-generation."""
REFUSED = replace(BASE, method="ngram", sampling=SamplingParams(top_k=VOCAB_SIZE + 1))
UNKNOWN = replace(BASE, method="made-up")


class Books:
    """What a gateway counted, and what its request spans say."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.telemetry = make_telemetry(
            "test", span_processor=SimpleSpanProcessor(self._spans), metric_reader=self.reader
        )

    @property
    def requests(self) -> list[ReadableSpan]:
        """Spans of the requests that ended."""
        return [span for span in self._spans.get_finished_spans() if span.name == "specdec.generate"]

    def counted(self, name: str, *labels: str) -> dict[tuple[Any, ...], int]:
        """Return counter values by labels, without zeros."""
        totals: Counter[tuple[Any, ...]] = Counter()
        for point in points(self.reader, name):
            totals[tuple(point.attributes[label] for label in labels)] += point.value
        return dict(+totals)


def values(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("specdec."): value for name, value in (span.attributes or {}).items()}


def in_order(method: str) -> str:
    return method_of(sorted(drafters_of(method)))


async def cancel_after(client: AsyncClient, options: GenerateOptions, num_tokens: int) -> None:
    async with client.stream(PROMPTS[0], options) as stream:
        async for _ in stream:
            num_tokens -= 1
            if not num_tokens:
                return


async def lose_verifier(system: System) -> None:
    """Make a request that fails with UNAVAILABLE after some rounds."""
    async with system.client.stream(PROMPTS[0], CHOSEN) as stream:
        await anext(aiter(stream))
        await anext(aiter(stream))
        await system.verifier.host.stop(0)
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass


async def refused(client: AsyncClient, options: GenerateOptions) -> None:
    with suppress(InvalidArgumentError):
        await client.generate(PROMPTS[0], options)
        pytest.fail("it was not refused")


async def test_counters_are_the_sums_of_the_requests(tiny_llama: Path, noisy_llama: Path) -> None:
    books = Books()
    async with running_system(
        tiny_llama,
        "ngram",
        f"noisy=causal-lm:{noisy_llama}",
        "broken",
        families={**FAMILIES, "broken": make_broken},
        telemetry=books.telemetry,
    ) as system:
        client = system.client
        await eventually_offers(client, "ngram", "noisy", "broken")
        pairs = [*product(PROMPTS, FINISHED)]
        answers, *_ = await asyncio.gather(
            asyncio.gather(*(client.generate(list(prompt), options) for prompt, options in pairs)),
            *(cancel_after(client, CHOSEN, num_tokens) for num_tokens in (1, 4, 20)),
            *(refused(client, options) for options in (REFUSED, UNKNOWN)),
        )
        await lose_verifier(system)
        num_requests = len(pairs) + 3 + 2 + 1
        await eventually(lambda: sum(books.counted("specdec.requests").values()) == num_requests)
        await eventually(lambda: len(books.requests) == num_requests)

    outcomes = {outcome: count for (outcome,), count in books.counted("specdec.requests", "outcome").items()}
    assert outcomes == {"length": len(pairs), "cancelled": 3, "invalid_argument": 2, "unavailable": 1}
    check_answers(books, answers)
    check_sums(books)
    check_proposers(books, answers)
    check_phases(books, answers)


def check_answers(books: Books, answers: list[Generation]) -> None:
    """Check that each answer's statistics are those of its span, and that all kinds of rounds occurred."""
    spans = {format_trace_id(span.context.trace_id): values(span) for span in books.requests if span.context}
    for answer in answers:
        mine, stats = spans[answer.trace_id], answer.speculation
        for name in ("num_rounds", "num_draft_tokens", "num_accepted_tokens", "num_fallback_rounds"):
            assert mine[name] == getattr(stats, name), name
        assert mine["num_accepted_tokens_per_position"] == stats.num_accepted_tokens_per_position
        assert mine["num_draft_tokens_per_position"] == stats.num_draft_tokens_per_position
    cut_short = [
        mine for trace, mine in spans.items() if trace not in {answer.trace_id for answer in answers}
    ]
    assert sum(mine.get("num_accepted_tokens", 0) for mine in cut_short) > 0
    stats_of_all = [answer.speculation for answer in answers]
    has_branches = [
        stats.num_draft_tokens > sum(stats.num_draft_tokens_per_position) for stats in stats_of_all
    ]
    assert any(has_branches), "trees"


def check_sums(books: Books) -> None:
    """Check the counters against the sums over all requests, including cancelled and failed ones."""
    by_name: dict[str, Counter[tuple[Any, ...]]] = {
        name: Counter() for name in ("rounds", "draft_tokens", "accepted_tokens", "fallback_rounds", "drafts")
    }
    by_position: dict[str, Counter[tuple[Any, ...]]] = {
        name: Counter() for name in ("draft_tokens", "accepted_tokens")
    }
    for mine in map(values, books.requests):
        if "num_rounds" not in mine:  # refused before it had a method
            continue
        method = in_order(mine["method"])
        for name in ("rounds", "draft_tokens", "accepted_tokens", "fallback_rounds"):
            by_name[name][(method,)] += mine[f"num_{name}"]
        by_name["drafts"][(method,)] += sum(mine["num_draft_tokens_per_position"][:1])
        for name, counts in by_position.items():
            for position, count in enumerate(mine[f"num_{name}_per_position"]):
                counts[(method, position)] += count
    for name, expected in by_name.items():
        assert books.counted(f"specdec.{name}", "method") == dict(+expected), name
    for name, expected in by_position.items():
        counted = books.counted(f"specdec.{name}_per_position", "method", "position")
        assert counted == dict(+expected), name
    assert ("internal",) in books.counted("specdec.fallback_rounds", "reason"), "the broken drafter's"


def check_proposers(books: Books, answers: list[Generation]) -> None:
    """Check the counters of each drafter of merged methods, whose requests all ran to their end."""
    expected: dict[str, Counter[tuple[Any, ...]]] = {
        name: Counter() for name in ("draft_tokens", "accepted_tokens", "fallback_rounds")
    }
    for answer in answers:
        for proposer in answer.speculation.proposers:
            for name, counts in expected.items():
                key = (in_order(answer.speculation.method), proposer.drafter)
                counts[key] += getattr(proposer, f"num_{name}")
    assert set(expected["draft_tokens"]) >= {("ngram+noisy", "ngram"), ("ngram+noisy", "noisy")}
    for name, counts in expected.items():
        assert books.counted(f"specdec.proposer.{name}", "method", "drafter") == dict(+counts), name


def check_phases(books: Books, answers: list[Generation]) -> None:
    """Check the times of the methods none of whose requests was cut short."""
    for method in ("none", "ngram+noisy"):
        own = [answer.speculation for answer in answers if in_order(answer.speculation.method) == method]
        for phase in ("draft", "verify", "transport"):
            expected_s = sum(getattr(stats, f"{phase}_ms") for stats in own) / 1e3
            (times,) = [
                point
                for point in points(books.reader, "specdec.round.phase_duration")
                if point.attributes == {"method": method, "phase": phase}
            ] or [None]
            assert (times.sum if times else 0.0) == pytest.approx(expected_s)


async def test_what_clients_make_up_makes_no_series(tiny_llama: Path) -> None:
    """While no drafter service was reached, any method is accepted, and its rounds count as OTHER's."""
    books = Books()
    async with (
        running_verifier(tiny_llama) as (verifier, _),
        running_gateway(
            tiny_llama,
            verifier=verifier,
            drafter="127.0.0.1:1",
            drafter_wait_s=0.1,
            default_method="ngram",
            telemetry=books.telemetry,
        ) as (gateway, _),
        AsyncClient(gateway) as client,
    ):
        for method in ("made-up", "another", "another+one", "ngram"):
            await client.generate([1, 2, 3], replace(BASE, method=method, max_new_tokens=6))
        await eventually(lambda: sum(books.counted("specdec.requests").values()) == 4)
    for name in ("requests", "rounds", "fallback_rounds"):
        methods = {method for (method,) in books.counted(f"specdec.{name}", "method")}
        assert methods == {OTHER, "ngram"}, name
    assert books.counted("specdec.fallback_rounds", "reason").keys() == {("unavailable",)}

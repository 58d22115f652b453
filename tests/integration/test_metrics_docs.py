"""docs/metrics.md and running services: the same metrics, types, units and labels on both sides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from opentelemetry.exporter.prometheus._mapping import map_unit, sanitize_attribute, sanitize_full_name

from tests.exposition import SERVICES, Exposition

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Row(NamedTuple):
    """One metric as a service exposes it, or as the table has it."""

    service: str
    family: str
    type: str
    labels: frozenset[str]


def documented() -> list[Row]:
    rows = []
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 6 or not cells[0].startswith("`"):
            continue
        name, kind, unit, labels, service, meaning = cells
        assert meaning, name
        ending = map_unit(unit)
        family = sanitize_full_name(name.strip("`")) + (f"_{ending}" if ending else "")
        names = frozenset(map(sanitize_attribute, re.findall(r"`([^`]+)`", labels)))
        rows.append(Row(service, family, kind, names))
    return rows


def exposed(exposition: Exposition) -> list[Row]:
    return [
        Row(
            service,
            family.name,
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels if label != "le"),
        )
        for service in SERVICES
        for family in exposition.families[service].values()
        if family.name != "target_info"
    ]


def test_the_table_and_running_services_have_the_same_metrics(exposition: Exposition) -> None:
    assert set(exposed(exposition)) == set(documented())


def test_every_service_says_who_it_is(exposition: Exposition) -> None:
    for service in SERVICES:
        (info,) = exposition.families[service]["target_info"].samples
        assert info.labels["service_name"] == service


def test_what_the_requests_did_is_there(exposition: Exposition) -> None:
    def values(service: str, family: str, label: str) -> dict[str, float]:
        samples = exposition.families[service][family].samples
        return {sample.labels[label]: sample.value for sample in samples if sample.name.endswith("_total")}

    assert values("gateway", "specdec_fallback_rounds", "reason").keys() == {"internal"}
    drafters = values("gateway", "specdec_proposer_draft_tokens", "drafter")
    assert drafters.keys() == {"ngram", "probe", "noisy", "broken"}
    assert values("drafter", "specdec_drafter_target_state_bytes", "storage").keys() == {
        "shared_memory",
        "stream",
    }
    assert values("gateway", "specdec_failovers", "method") == {"ngram": 1}
    assert "unheard-of" not in str(exposition)

"""Dashboards and rules: every metric and label they name is one that running services expose."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.exposition import Exposition
from tests.promql import parse

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yaml"
TESTS_OF_RULES = DEPLOY / "prometheus" / "rules_test.yaml"
Names = Mapping[str, set[str]]
"""Labels by metric."""


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exposed(exposition: Exposition) -> dict[str, set[str]]:
    """Return the labels by the name of a sample, of all services."""
    names: dict[str, set[str]] = {}
    for families in exposition.families.values():
        for family in families.values():
            for sample in family.samples:
                names.setdefault(sample.name, set()).update(sample.labels)
    return names


def problems(query: str, names: Names, legend: str = "") -> list[str]:
    """Return what a query names that does not exist."""
    parsed = parse(query)
    found = [f"no metric {metric}" for metric in sorted(parsed.metrics - names.keys())]
    found += [
        f"{metric} has no label {label}"
        for metric, labels in parsed.selected
        for label in sorted(labels - names.get(metric, set()))
    ]
    there = set[str]().union(*(names.get(metric, set()) for metric in parsed.metrics))
    found += [f"no metric has the label {label}" for label in sorted(parsed.grouped - there)]
    shown = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))
    found += [f"the legend's {label} is not grouped by" for label in sorted(shown - parsed.grouped)]
    return found


def queries(dashboard: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the title, the expression and the legend of each query of a dashboard."""
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
class TestDashboard:
    def test_every_query_reads_what_is_there(self, dashboard: Path, exposition: Exposition) -> None:
        names, all_queries = exposed(exposition), list(queries(dashboard))
        wrong = {title: problems(expr, names, legend) for title, expr, legend in all_queries}
        assert len(all_queries) > 30
        assert {title: found for title, found in wrong.items() if found} == {}

    def test_every_metric_is_shown(self, dashboard: Path, exposition: Exposition) -> None:
        shown = {metric for _, expr, _ in queries(dashboard) for metric in parse(expr).metrics}
        for families in exposition.families.values():
            for family in families.values():
                if family.name in ("target_info", *NOT_SHOWN):
                    continue
                assert shown & {sample.name for sample in family.samples}, family.name

    def test_variables_exist_and_are_used(self, dashboard: Path, exposition: Exposition) -> None:
        content = json.loads(dashboard.read_text(encoding="utf-8"))
        variables = {variable["name"]: variable for variable in content["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        for name, variable in variables.items():
            assert f"${name}" in dashboard.read_text() or f"${{{name}}}" in dashboard.read_text()
            if variable["type"] == "query":
                ((metric, label),) = re.findall(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
                assert label in exposed(exposition)[metric]
        for panel in content["panels"]:
            for target in panel.get("targets", []):
                assert target["datasource"]["uid"] == "${datasource}"

    def test_panels_are_numbered_and_do_not_overlap(self, dashboard: Path) -> None:
        panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            at = panel["gridPos"]
            cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
            assert not taken & cells, panel["title"]
            assert at["x"] + at["w"] <= 24
            taken |= cells

    def test_queries_are_promql(self, dashboard: Path, tmp_path: Path) -> None:
        expressions = [expr.replace("$__rate_interval", "5m") for _, expr, _ in queries(dashboard)]
        group = [{"record": f"query:{i}", "expr": expr} for i, expr in enumerate(expressions)]
        path = tmp_path / "queries.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": group}]}))
        promtool("check", "rules", str(path))


NOT_SHOWN = {"specdec_verifier_rounds", "specdec_drafter_rounds"}
"""The gateway's own count of rounds is shown by method."""


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    ended = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


class TestRules:
    def test_every_rule_reads_what_is_there(self, exposition: Exposition) -> None:
        names = exposed(exposition)
        for rule in rules():
            assert problems(rule["expr"], names) == [], rule
            if "record" in rule:
                names[rule["record"]] = parse(rule["expr"]).grouped - {"le"}

    def test_alerts_say_what_to_do(self) -> None:
        alerts = [rule for rule in rules() if "alert" in rule]
        assert len(alerts) > 10
        for alert in alerts:
            assert alert["labels"]["severity"] in ("critical", "warning", "info")
            assert alert["annotations"].keys() == {"summary", "description"}

    def test_rules_do_what_their_tests_say(self) -> None:
        assert "SUCCESS" in promtool("check", "rules", str(RULES))
        assert "SUCCESS" in promtool("test", "rules", str(TESTS_OF_RULES))

    def test_every_rule_has_a_test(self) -> None:
        tested = TESTS_OF_RULES.read_text(encoding="utf-8")
        for rule in rules():
            assert rule.get("record", rule.get("alert")) in tested


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sum by (method) (rate(specdec_rounds_total[5m])) > 0 or vector(1)", []),
        ("histogram_quantile(0.9, sum by (le) (rate(specdec_verifier_batch_size_bucket[5m])))", []),
        ("rate(specdec_round_total[5m])", ["no metric specdec_round_total"]),
        ('specdec_rounds_total{methods="x"}', ["specdec_rounds_total has no label methods"]),
        ("sum by (position) (specdec_rounds_total)", ["no metric has the label position"]),
        ("specdec_drafts_total / on(reason) specdec_rounds_total", ["no metric has the label reason"]),
    ],
)
def test_wrong_names_are_found(query: str, expected: list[str], exposition: Exposition) -> None:
    assert problems(query, exposed(exposition)) == expected


def test_the_collector_receives_what_services_send_and_serves_what_is_scraped() -> None:
    config = yaml.safe_load((DEPLOY / "otel" / "collector.yaml").read_text(encoding="utf-8"))
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= config[kind].keys()
        assert pipeline["receivers"] == ["otlp"]
    assert "grpc" in config["receivers"]["otlp"]["protocols"]  # what the services' exporter speaks
    assert config["exporters"]["prometheus"]["endpoint"].endswith(":9464")

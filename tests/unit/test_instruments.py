"""Counters that are sums until somebody collects."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics import Counter as SdkCounter
from opentelemetry.sdk.metrics import ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader

from specdec.service.exporters import make_telemetry
from specdec.service.instruments import Counter, EngineMetrics


def collected(reader: InMemoryMetricReader) -> dict[tuple[object, ...], float]:
    """Return the values of the only metric by its attributes, sorted by name."""
    data = reader.get_metrics_data()
    assert data
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    return {
        tuple(value for _, value in sorted((point.attributes or {}).items())): point.value  # type: ignore[union-attr]
        for point in metric.data.data_points
    }


def test_counts_by_label_values() -> None:
    reader = InMemoryMetricReader()
    counter = Counter(make_telemetry("test", metric_reader=reader).meter, "n", "a", "b", unit="1")
    for amount, values in ((1, ("x", 1)), (2, ("x", 1)), (5, ("y", 2)), (0, ("z", 3))):
        counter.add(amount, *values)
    assert collected(reader) == {("x", 1): 3, ("y", 2): 5, ("z", 3): 0}


def test_of_one_name_and_meter_there_is_one() -> None:
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader)
    for _ in range(3):
        Counter(telemetry.meter, "n", "a", unit="1").add(2, "x")
    assert collected(reader) == {("x",): 6}
    other = InMemoryMetricReader()
    Counter(make_telemetry("test", metric_reader=other).meter, "n", "a", unit="1").add(1, "x")
    assert collected(other) == {("x",): 1}


def test_a_reader_of_differences_gets_them() -> None:
    delta = dict.fromkeys((SdkCounter, ObservableCounter), AggregationTemporality.DELTA)
    reader = InMemoryMetricReader(preferred_temporality=delta)
    counter = Counter(make_telemetry("test", metric_reader=reader).meter, "n", unit="1")
    counter.add(3)
    assert collected(reader) == {(): 3}
    counter.add(4)
    assert collected(reader) == {(): 4}


def test_another_number_of_label_values_is_a_defect() -> None:
    counter = Counter(make_telemetry("test").meter, "n", "a", unit="1")
    with pytest.raises(AssertionError):
        counter.add(1)


def test_steps_are_measured_in_items_tokens_and_seconds() -> None:
    reader = InMemoryMetricReader()
    engine = EngineMetrics(make_telemetry("test", metric_reader=reader).meter, "test")
    engine.add_step(3, 40, 250_000_000)
    engine.add_step(1, 8, 1_500_000_000)
    data = reader.get_metrics_data()
    assert data
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    sums = {metric.name: (metric.unit, metric.data.data_points[0].sum) for metric in metrics}  # type: ignore[union-attr]
    assert sums == {
        "test.batch_size": ("{item}", 4),
        "test.batch_tokens": ("{token}", 48),
        "test.step_duration": ("s", 1.75),
    }

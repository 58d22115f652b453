"""Instruments that several services have: counters, gauges that are read on demand, engine metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

from opentelemetry.metrics import CallbackOptions, Meter, Observation

SHORT_TIMES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bucket boundaries for parts of a round and for engine steps, seconds."""
LabelValue = str | bool | int
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_totals: WeakKeyDictionary[Meter, dict[str, dict[tuple[LabelValue, ...], int]]] = WeakKeyDictionary()
"""The totals of all counters, by meter, name and label values."""


class Counter:
    """A counter whose cost in a round is one addition: OpenTelemetry reads the totals when it collects.

    Counters of one meter and name share their totals, because OpenTelemetry would not read a second
    observable instrument of the same name.

    Args:
        labels: names of the labels whose values `add` takes.
    """

    def __init__(self, meter: Meter, name: str, *labels: str, unit: str, description: str = "") -> None:
        self._labels = labels
        counters = _totals.setdefault(meter, {})
        is_new = name not in counters
        self._of_values = counters.setdefault(name, {})
        if is_new:
            meter.create_observable_counter(name, [self._observe], unit=unit, description=description)

    def add(self, amount: int, *values: LabelValue) -> None:
        """Add `amount` to the total of the label values, one per label. Only one thread may call this."""
        assert len(values) == len(self._labels), self._labels
        self._of_values[values] = self._of_values.get(values, 0) + amount

    def _observe(self, options: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(total, dict(zip(self._labels, values, strict=True)))
            for values, total in self._of_values.copy().items()
        ]


def observe_values(
    meter: Meter,
    name: str,
    read: Callable[[], Mapping[str, int]],
    *,
    label: str,
    unit: str,
    description: str,
) -> None:
    """Make a gauge with one series per value of `label`. The thread that collects metrics calls `read`."""

    def observe(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, {label: key}) for key, value in read().items()]

    meter.create_observable_gauge(name, [observe], unit=unit, description=description)


def observe_value(meter: Meter, name: str, read: Callable[[], int], *, unit: str, description: str) -> None:
    """Make a gauge with a single series; see `observe_values`."""

    def observe(options: CallbackOptions) -> Sequence[Observation]:
        return [Observation(read())]

    meter.create_observable_gauge(name, [observe], unit=unit, description=description)


class EngineMetrics:
    """The metrics of a service's engine and of its steps.

    Args:
        prefix: beginning of the metrics' names, such as "specdec.verifier".
    """

    def __init__(self, meter: Meter, prefix: str) -> None:
        self._meter, self._prefix = meter, prefix
        self._batch_size = meter.create_histogram(
            f"{prefix}.batch_size",
            unit="{item}",
            description="Items of an engine step",
            explicit_bucket_boundaries_advisory=_BATCH_SIZES,
        )
        self._batch_tokens = meter.create_histogram(
            f"{prefix}.batch_tokens",
            unit="{token}",
            description="Tokens of an engine step",
            explicit_bucket_boundaries_advisory=_BATCH_TOKENS,
        )
        self._step_duration = meter.create_histogram(
            f"{prefix}.step_duration",
            unit="s",
            description="Time of an engine step",
            explicit_bucket_boundaries_advisory=SHORT_TIMES_S,
        )

    def add_step(self, batch_size: int, batch_tokens: int, duration_ns: int) -> None:
        """Record a finished step. The engine's thread calls this."""
        self._batch_size.record(batch_size)
        self._batch_tokens.record(batch_tokens)
        self._step_duration.record(duration_ns / 1e9)

    def observe_queue(self, num_waiting: Callable[[], int]) -> None:
        """Report how many items wait for an engine step."""
        observe_value(
            self._meter,
            f"{self._prefix}.queue_depth",
            num_waiting,
            unit="{item}",
            description="Items that wait for an engine step",
        )

    def observe_sessions(self, num_sessions: Callable[[], int], max_sessions: int) -> None:
        """Report how many session slots are in use, and how many exist."""
        observe_value(
            self._meter,
            f"{self._prefix}.sessions",
            num_sessions,
            unit="{session}",
            description="Session slots in use",
        )
        observe_value(
            self._meter,
            f"{self._prefix}.session_slots",
            lambda: max_sessions,
            unit="{session}",
            description="Session slots in all",
        )

"""The Prometheus endpoint: what a service counts can be scraped, beside OTLP, until it shuts down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import GatewayConfig
from specdec.client import GenerateOptions
from specdec.contract.errors import InvalidArgumentError
from specdec.service.exporters import make_telemetry, telemetry_from_environment
from tests.integration.gated_drafter import eventually
from tests.slow import quick_only
from tests.systems import ANY_PORT, running_system
from tests.unit.test_stats import sums
from verifier_service.config import VerifierConfig


def scrape(address: str) -> str:
    with urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


def sample(address: str, name: str, **labels: str) -> float:
    """Return the sum of the samples of that name with these labels."""
    return sum(
        measured.value
        for family in text_string_to_metric_families(scrape(address))
        for measured in family.samples
        if measured.name == name and labels.items() <= measured.labels.items()
    )


async def test_both_readers_tell_the_same(tiny_llama: Path) -> None:
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader, metrics_listen=ANY_PORT)
    assert telemetry.prometheus
    address = telemetry.prometheus.address
    async with running_system(tiny_llama, telemetry=telemetry) as system:
        options = GenerateOptions(method="ngram", draft_depth=3, max_new_tokens=20, ignore_eos=True)
        result = await system.client.generate([5, 6, 7, 5, 6, 7], options)
        await eventually(lambda: bool(sums(reader, "specdec.requests")))
        assert sums(reader, "specdec.rounds") == {"ngram": result.speculation.num_rounds}
        rounds = sample(address, "specdec_rounds_total", method="ngram")
        assert rounds == result.speculation.num_rounds
    with pytest.raises(URLError):
        scrape(address)
    make_telemetry("next", metrics_listen=address).shutdown()  # the port is free again


def test_each_endpoint_has_its_own_metrics() -> None:
    here, there = (make_telemetry(name, metrics_listen=ANY_PORT) for name in ("one", "other"))
    try:
        assert here.prometheus
        assert there.prometheus
        here.meter.create_counter("only.here").add(1)
        there.meter.create_counter("only.there").add(1)
        assert sample(here.prometheus.address, "only_here_total") == 1
        assert "only_here" not in scrape(there.prometheus.address)
        assert 'service_name="other"' in scrape(there.prometheus.address)
    finally:
        here.shutdown()
        there.shutdown()


@pytest.mark.parametrize("listen", ["9464", ":9464", "localhost:", "localhost:http", "localhost:65536"])
@pytest.mark.parametrize("config_type", [GatewayConfig, VerifierConfig])
def test_an_address_without_host_or_port_is_refused(
    config_type: type[GatewayConfig] | type[VerifierConfig], listen: str
) -> None:
    with pytest.raises(InvalidArgumentError, match="--metrics-listen") as caught:
        config_type(metrics_listen=listen)
    assert caught.value.field == "metrics_listen"


def test_metrics_that_are_asked_for_and_disabled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    telemetry_from_environment("service").shutdown()
    with pytest.raises(InvalidArgumentError, match="OTEL_SDK_DISABLED"):
        telemetry_from_environment("service", ANY_PORT)


@pytest.mark.parametrize(
    "module", quick_only(["gateway", "verifier_service", "drafter_service"], ["gateway", "drafter_service"])
)
def test_a_port_in_use_ends_a_service_at_its_start(module: str) -> None:
    telemetry = make_telemetry("holder", metrics_listen=ANY_PORT)
    assert telemetry.prometheus
    try:
        command = [sys.executable, "-m", module, "--listen", ANY_PORT]
        ended = subprocess.run(
            [*command, "--metrics-listen", telemetry.prometheus.address],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        telemetry.shutdown()
    assert ended.returncode == 2
    assert "--metrics-listen" in ended.stderr
    assert "in use" in ended.stderr

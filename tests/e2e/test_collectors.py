"""A collector that is down, says nothing, or speaks another protocol."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from specdec.local.processes import Service, ServiceGroup, ServiceSpec, free_ports
from tests.raw_streams import draft_stream, until

LATEST_S = 6.0
"""Seconds from SIGTERM to the end: what a collector may cost, and as much again for a busy machine. With the
exporters' own patience it was 20 s."""


@contextmanager
def a_collector(kind: str) -> Iterator[str]:
    """Yield the address of a collector that refuses connections, or takes them and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if kind == "refuses":
            listener.close()
        yield f"http://127.0.0.1:{port}"


@contextmanager
def a_drafter(log_dir: Path, env: Mapping[str, str]) -> Iterator[Service]:
    """Run a drafter service, the quickest to start."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = (sys.executable, "-m", "drafter_service", "--listen", address, "--drafter", "ngram")
    spec = ServiceSpec("drafter", address, command, "specdec.v1.DrafterService")
    group = ServiceGroup([spec], log_dir, env=env, ready_timeout_s=60)
    with group:
        yield group.services[0]


@pytest.mark.parametrize("kind", ["refuses", "silent"])
async def test_a_sick_collector_does_not_hold_up_the_end(kind: str, tmp_path: Path) -> None:
    with (
        a_collector(kind) as endpoint,
        a_drafter(tmp_path, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as drafter,
    ):
        async with draft_stream(drafter.spec.address) as stream:
            await stream.open("ngram", [5, 6, 7, 5, 6, 7])
            assert len(await stream.round([5], 7)) > 0
        signalled_at = time.monotonic()
        os.kill(drafter.pid, signal.SIGTERM)
        await until(lambda: drafter.exit_code is not None, timeout_s=60)
        took_s = time.monotonic() - signalled_at
    assert drafter.exit_code == 0, drafter.describe_exit()
    assert took_s < LATEST_S
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in drafter.log_path.read_text(), "the log says what was lost"


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"])
def test_a_protocol_that_is_not_exported_is_refused_at_the_start(variable: str) -> None:
    command = [sys.executable, "-m", "drafter_service", "--listen", "127.0.0.1:0", "--drafter", "ngram"]
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", variable: "http/protobuf"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | settings
    )
    assert result.returncode == 2, result.stderr
    assert f"{variable} is 'http/protobuf'" in result.stderr
    assert "Set it to grpc" in result.stderr
    assert "4317" in result.stderr
    assert "Traceback" not in result.stderr

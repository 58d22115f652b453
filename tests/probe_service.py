"""A drafter service with a drafter that reads target state, as a process: python -m tests.probe_service.

Its one family is "probe:MS": each round reads everything again and again for that many milliseconds, and
compares it with what it read before. A difference is a failure of the drafter, which the request's fallback
reason tells.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from drafter_service.config import STREAM_FEATURES, DrafterConfig
from drafter_service.families import DrafterFactory, DrafterSpec
from specdec.local import probe
from specdec.local.processes import Service, ServiceGroup, ServiceSpec
from specdec.runtime.loading import DTYPES
from specdec.service.config import config_options
from specdec.service.tuning import tune_process

ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
"""A tiny model gains nothing from a second thread. The tests are not installed, but found by their folder."""


def probe_command(address: str, milliseconds: int, *arguments: str) -> tuple[str, ...]:
    """Return the command line of the service."""
    drafter = ("--drafter", f"probe:{milliseconds}", "--dtype", "float32")
    return (sys.executable, "-m", "tests.probe_service", "--listen", address, *drafter, *arguments)


def verifier_command(address: str, model: Path, *arguments: str) -> tuple[str, ...]:
    """Return the command line of a verifier of `model`."""
    options = ("--model", str(model), "--dtype", "float32", "--kv-cache-mib", "4")
    return (sys.executable, "-m", "verifier_service", "--listen", address, *options, *arguments)


def is_serving(service: Service) -> bool:
    """Return whether a process says that it is healthy."""
    return probe.is_serving(service.spec.address, service.spec.health_service)


def service_group(log_dir: Path, commands: Mapping[str, tuple[str, Sequence[str]]]) -> ServiceGroup:
    """Return the services by name, "verifier..." or "drafter...", each with its address and command line."""
    specs = [
        ServiceSpec(name, address, tuple(command), f"specdec.v1.{_kind(name)}Service")
        for name, (address, command) in commands.items()
    ]
    return ServiceGroup(specs, log_dir, env=ENV, ready_timeout_s=60)


def _kind(name: str) -> str:
    return "Verifier" if name.startswith("verifier") else "Drafter"


def _families() -> Mapping[str, DrafterFactory]:
    from tests.state_probe import ProbeSession, StateProbe, all_of, assert_never_changed, read_all

    def make(spec: DrafterSpec, config: DrafterConfig) -> StateProbe:
        def read_on(session: ProbeSession) -> None:
            if len(session.readings) > 1:
                assert_never_changed(session.readings)
                del session.readings[0]
            until = time.monotonic() + float(spec.model) / 1000
            while time.monotonic() < until:
                assert session.view is not None
                read_all(session.view)

        return StateProbe(all_of("llama"), after_reading=read_on, name=spec.name)

    return {"probe": make}


@click.command()
@config_options(DrafterConfig, choices={"dtype": DTYPES, "stream_features": STREAM_FEATURES})
def main(**options: object) -> None:
    """Serve the probe."""
    tune_process()
    from drafter_service.server import DrafterServer
    from specdec.service.process import serve_from_command_line

    serve = partial(DrafterServer, families=_families())
    serve_from_command_line("probe-service", DrafterConfig, options, serve)


if __name__ == "__main__":
    main()

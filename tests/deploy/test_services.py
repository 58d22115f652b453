"""What manifests ask of the services is what those know: options, ports, health names, images, grace."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import drafter_service.cli
import drafter_service.service
import gateway.cli
import gateway.service
import verifier_service.cli
import verifier_service.service
from drafter_service.config import DrafterConfig
from gateway.config import GatewayConfig
from specdec.models.embedded import DEFAULT_MODEL
from specdec.service.health import LIVENESS
from specdec.service.host import ServiceHost
from specdec.transport.channel import parse_uris
from tests.deploy.manifests import DEPLOY, SERVICES, Container, Manifests
from verifier_service.config import VerifierConfig

COMMANDS: dict[str, tuple[click.Command, Any, str]] = {
    "gateway": (gateway.cli.main, GatewayConfig, gateway.service.SERVICE_NAME),
    "verifier": (verifier_service.cli.main, VerifierConfig, verifier_service.service.SERVICE_NAME),
    "drafter": (drafter_service.cli.main, DrafterConfig, drafter_service.service.SERVICE_NAME),
}
CLOSING_S = 15.0
"""What a service may need after its drain, to free what it holds and to send its telemetry."""
ADDRESSES = ("LISTEN", "HTTP_LISTEN", "HEALTH_LISTEN", "METRICS_LISTEN")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OTHERS_VARIABLES = {"HF_HUB_OFFLINE", "POD_IP"}


def parse(service: str, environment: dict[str, str], patch: pytest.MonkeyPatch) -> Any:
    """Return the configuration that a service's real command line makes of environment variables."""
    command, config_type, _ = COMMANDS[service]
    known = {f"SPECDEC_{service.upper()}_{(option.name or '').upper()}" for option in command.params}
    assert environment.keys() - OTHERS_VARIABLES <= known
    for name, value in environment.items():
        patch.setenv(name, value)
    return config_type(**command.make_context(service, []).params)


def configs(manifests: Manifests, patch: pytest.MonkeyPatch) -> dict[str, tuple[Container, Any]]:
    """Return the container and the configuration of each service."""
    return {
        container.service: (container, parse(container.service, dict(container.options), patch))
        for container in manifests.containers()
    }


def test_every_option_is_one_of_the_service(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs(manifests, monkeypatch).keys() == set(SERVICES)


def test_a_misspelt_option_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        parse("verifier", {"SPECDEC_VERIFIER_MODLE": "default"}, monkeypatch)


def test_pods_have_the_ports_the_services_listen_on(manifests: Manifests) -> None:
    for container in manifests.containers():
        declared = {
            port["name"]: port["containerPort"] for port in container.spec.get("ports", []) if "name" in port
        }
        if not declared:
            continue  # podman publishes ports that are declared
        listening = {container.port(option) for option in ADDRESSES if container.option(option)}
        assert len(listening) == (4 if container.service == "gateway" else 3)
        assert set(declared.values()) == listening
        assert declared[container.service] == container.port("LISTEN")
        assert all(container.option(name).startswith("0.0.0.0:") for name in ("LISTEN", "HEALTH_LISTEN"))


def test_containers_of_a_pod_have_ports_of_their_own(manifests: Manifests) -> None:
    pods: dict[int, list[int]] = {}
    for container in manifests.containers():
        ports = [container.port(option) for option in ADDRESSES if container.option(option)]
        pods.setdefault(id(container.pod), []).extend(ports)
    assert all(len(ports) == len(set(ports)) for ports in pods.values())


def test_probes_ask_for_names_the_services_report(cluster: Manifests) -> None:
    for container in cluster.containers():
        name = COMMANDS[container.service][2]
        startup, readiness, liveness = (
            container.spec[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")
        )
        assert {startup["port"], readiness["port"], liveness["port"]} == {container.port("HEALTH_LISTEN")}
        assert readiness["service"] == name
        assert liveness["service"] == LIVENESS
        # A gateway is NOT_SERVING as long as it has no verifier, which is not a reason to restart it.
        assert startup["service"] == (LIVENESS if container.service == "gateway" else name)


def test_there_is_time_to_drain(cluster: Manifests) -> None:
    for container in cluster.containers():
        sleep_s = container.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = float(container.option("DRAIN_GRACE_S"))
        assert container.pod["terminationGracePeriodSeconds"] >= sleep_s + drain_s + CLOSING_S


def test_the_gateway_calls_the_services_by_their_names(cluster: Manifests) -> None:
    container = next(container for container in cluster.containers() if container.service == "gateway")
    for service in ("verifier", "drafter"):
        (uri,) = parse_uris(container.option(service.upper()))
        host, port = re.fullmatch(r"dns:///([\w-]+):(\d+)", uri).groups()  # type: ignore[union-attr]
        target = cluster.get("Service", host)["spec"]
        assert target["clusterIP"] == "None", "a gateway watches every replica"
        assert [entry["port"] for entry in target["ports"]] == [int(port)]


def test_verifiers_can_be_reached_where_they_say(cluster: Manifests) -> None:
    container = next(container for container in cluster.containers() if container.service == "verifier")
    assert container.option("ADVERTISE") == f"$(POD_IP):{container.port('LISTEN')}"
    address = next(entry for entry in container.spec["env"] if entry["name"] == "POD_IP")
    assert address["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


def test_drafters_may_call_the_verifiers_and_nobody_else(manifests: Manifests) -> None:
    gateway, drafter = (
        next(container for container in manifests.containers() if container.service == service)
        for service in ("gateway", "drafter")
    )
    assert drafter.option("VERIFIER_ALLOW") == gateway.option("VERIFIER")


def test_gateway_verifier_and_drafter_mean_the_same_model(manifests: Manifests) -> None:
    model = {container.service: container for container in manifests.containers()}
    target = model["verifier"].option("MODEL")
    assert target
    assert model["gateway"].option("TOKENIZER") == model["drafter"].option("TARGET") == target


def test_models_are_there(manifests: Manifests) -> None:
    for container in manifests.containers():
        entries = " ".join(container.option(name) for name in ("MODEL", "TOKENIZER", "TARGET", "DRAFTER"))
        for path in re.findall(r"/models/([\w.-]+)", entries):
            fetched = [part for job in manifests.pod_specs() for part in job["containers"]]
            assert any(f"/models/{path}" in part.get("command", []) for part in fetched)
            assert any(mount["mountPath"] == "/models" for mount in container.spec["volumeMounts"])


def test_the_default_method_is_offered(manifests: Manifests) -> None:
    by_service = {container.service: container for container in manifests.containers()}
    offered = {entry.partition(":")[0] for entry in by_service["drafter"].option("DRAFTER").split()}
    assert set(by_service["gateway"].option("DEFAULT_METHOD").split("+")) <= offered


def test_models_have_as_many_threads_as_cpus(cluster: Manifests) -> None:
    for container in cluster.containers():
        if container.service != "gateway":
            assert 0 < int(container.option("THREADS")) <= float(container.spec["resources"]["limits"]["cpu"])


def test_images_are_those_the_dockerfile_makes(manifests: Manifests) -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
    images = {spec["image"] for pod in manifests.pod_specs() for spec in pod["containers"]}
    for image in images:
        service = image.partition(":")[0].removeprefix("specdec-")
        assert service in stages
        assert service in SERVICES
    for container in manifests.containers():
        assert container.spec["image"].startswith(f"specdec-{container.service}:")


@pytest.mark.parametrize("service", SERVICES)
def test_images_start_their_service(service: str) -> None:
    stage = DOCKERFILE[DOCKERFILE.index(f" AS {service}\n") :].partition("\nFROM ")[0]
    assert f'ENTRYPOINT ["specdec-{service}"]' in stage
    port = str(COMMANDS[service][1]().listen).rpartition(":")[2]
    assert f"EXPOSE {port}" in stage


def test_the_embedded_model_is_baked_in(manifests: Manifests) -> None:
    """A pod that wants the model has neither PyPI nor a root it could write to."""
    wanted = any(container.option("MODEL") == DEFAULT_MODEL for container in manifests.containers())
    assert not wanted or "prepare_default_model" in DOCKERFILE


class TestCompose:
    @pytest.fixture
    def services(self) -> dict[str, Any]:
        composition = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
        return dict(composition["services"])

    def test_every_option_is_one_of_the_service(
        self, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert services.keys() == set(SERVICES)
        for name, service in services.items():
            assert service["build"]["args"] == {"SERVICE": name}
            assert Path(service["build"]["dockerfile"]).name == "Dockerfile"
            config = parse(
                name, {key: str(value) for key, value in service["environment"].items()}, monkeypatch
            )
            assert config.listen.startswith("0.0.0.0:")
            if name == "gateway":
                listening = [address.rpartition(":")[2] for address in (config.listen, config.http_listen)]
                assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in listening]
            assert int(service["stop_grace_period"].removesuffix("s")) >= config.drain_grace_s + CLOSING_S

    def test_the_drafter_may_call_the_verifier_and_nobody_else(self, services: dict[str, Any]) -> None:
        allowed = services["drafter"]["environment"]["SPECDEC_DRAFTER_VERIFIER_ALLOW"]
        assert allowed == services["verifier"]["environment"]["SPECDEC_VERIFIER_ADVERTISE"]

    def test_handles_fit_into_shared_memory(self, services: dict[str, Any]) -> None:
        verifier, drafter = services["verifier"], services["drafter"]
        assert drafter["ipc"] == drafter["network_mode"] == "service:verifier"
        assert verifier["environment"]["SPECDEC_VERIFIER_KV_CACHE_MIB"] < 1024 * math.floor(
            int(verifier["shm_size"].removesuffix("gb"))
        )

    def test_the_drafter_reads_state_and_nothing_else_of_the_verifier(self, services: dict[str, Any]) -> None:
        verifier, drafter = services["verifier"], services["drafter"]
        assert "pid" not in drafter
        (verifier_user, group), (drafter_user, other) = (
            service["user"].split(":") for service in (verifier, drafter)
        )
        assert verifier_user != drafter_user
        assert verifier["environment"]["SPECDEC_VERIFIER_SHARED_GROUP"] == group == other
        assert drafter["environment"]["SPECDEC_DRAFTER_SHARED_GROUP"] == group

    async def test_health_checks_tell_who_serves(self, services: dict[str, Any]) -> None:
        for name, service in services.items():
            kind, program, *arguments, address = service["healthcheck"]["test"]
            assert (kind, program) == ("CMD", "python")
            listen = service["environment"][f"SPECDEC_{name.upper()}_LISTEN"]
            assert address == listen.replace("0.0.0.0", "127.0.0.1")

            async def is_healthy(address: str, arguments: list[str] = arguments) -> bool:
                command = [sys.executable, *arguments, address]
                done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False)
                return done.returncode == 0

            host = ServiceHost(COMMANDS[name][2], lambda server: None, "127.0.0.1:0")
            address = await host.start()
            try:
                assert not await is_healthy(address)
                host.set_serving()
                assert await is_healthy(address)
            finally:
                await host.stop(grace_s=0)
            assert not await is_healthy(address)

    def test_the_drafter_starts_anew_with_the_namespaces_it_shares(self, services: dict[str, Any]) -> None:
        assert services["drafter"]["depends_on"]["verifier"]["restart"] is True

    def test_the_gateway_starts_with_all_it_calls(self, services: dict[str, Any]) -> None:
        wanted = {name: {"condition": "service_healthy"} for name in services if name != "gateway"}
        assert services["gateway"]["depends_on"] == wanted

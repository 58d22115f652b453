"""What manifests say of each other: labels and selectors, networks, security, scaling, certificates."""

from __future__ import annotations

import asyncio
import base64
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gateway.callers import TokenFile
from specdec.cli.main import main
from tests.deploy.manifests import (
    CLUSTER_OVERLAYS,
    DEPLOY,
    KUBERNETES,
    ROOT,
    VARIANTS,
    Container,
    Manifests,
    overlay,
    render,
    tool,
    variant,
)
from tests.deploy.policies import Peer, is_allowed

METRICS = {
    name.replace(".", "_")
    for name in re.findall(
        r"^\| `(specdec\.[\w.]+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
}
GEMMA = (ROOT / "docs" / "gemma4.md").read_text()
KV_KIB = {
    "default": 30 * 2 * 3 * 64 * 2 / 1024,  # SmolLM2-135M: layers, keys and values, heads, their size, bytes
    "/models/gemma-4-31B-it": float(re.findall(r"\| ([\d.]+) KiB a token", GEMMA)[0]),
}
"""What a token takes of a verifier's pool, by model."""
STREAMED_KIB = float(re.findall(r"Streamed, the same state is ([\d.]+) KiB a token", GEMMA)[0])
LEAST_SESSION_TOKENS = 1024
"""Prompt and answer of sessions that fill all slots of a service."""
UNITS = {"Mi": 1, "Gi": 1024}


def image_users() -> dict[str, tuple[int, int]]:
    """Return user and group of each service's image."""
    users: dict[str, tuple[int, int]] = {}
    for stage in (DEPLOY / "Dockerfile").read_text().split("\nFROM ")[1:]:
        base, _, name = stage.partition("\n")[0].partition(" AS ")
        found = re.search(r"^USER (\d+):(\d+)$", stage, re.MULTILINE)
        if found or base in users:
            users[name] = (int(found[1]), int(found[2])) if found else users[base]
    return users


IMAGE_USERS = image_users()


def mib(quantity: str) -> int:
    """Convert a quantity of memory to MiB."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def host_paths(manifests: Manifests) -> list[str]:
    """Return the folders of the node that pods see."""
    volumes = (volume for pod in manifests.pod_specs() for volume in pod["volumes"])
    return [volume["hostPath"]["path"] for volume in volumes if "hostPath" in volume]


def pod_of(manifests: Manifests, service: str) -> dict[str, Any]:
    """Return the pod template that runs a service."""
    (template,) = manifests.matching_pods({f"specdec/{service}": "true"})
    return template


def hours(duration: str) -> float:
    """Convert a duration as cert-manager writes it to hours."""
    assert duration.endswith("h")
    return float(duration[:-1])


def cpus(quantity: str) -> float:
    """Convert a quantity of CPUs to a number."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def mounted_secrets(container: Container) -> dict[str, dict[str, Any]]:
    """Return the secrets that a container sees, by folder."""
    secrets = {volume["name"]: volume["secret"] for volume in container.pod["volumes"] if "secret" in volume}
    mounts = container.spec["volumeMounts"]
    return {mount["mountPath"]: secrets[mount["name"]] for mount in mounts if mount["name"] in secrets}


def replica_limits(manifests: Manifests) -> dict[str, tuple[int, int]]:
    """Return the least and the greatest number of replicas by Deployment. Check that each has at most one
    autoscaler.
    """
    limits = [
        (scaler["spec"]["scaleTargetRef"]["name"], (scaler["spec"][min_key], scaler["spec"][max_key]))
        for kind, min_key, max_key in (
            ("HorizontalPodAutoscaler", "minReplicas", "maxReplicas"),
            ("ScaledObject", "minReplicaCount", "maxReplicaCount"),
        )
        for scaler in manifests.of(kind)
    ]
    assert len(dict(limits)) == len(limits)
    return dict(limits)


def sessions_thresholds(manifests: Manifests) -> dict[str, float]:
    """Return, by Deployment, how many sessions a replica has when its autoscaler adds another replica."""
    targets = {
        scaler["spec"]["scaleTargetRef"]["name"]: metric["pods"]["target"]["averageValue"]
        for scaler in manifests.of("HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
        if metric["type"] == "Pods" and metric["pods"]["metric"]["name"].endswith("_sessions")
    } | {
        scaler["spec"]["scaleTargetRef"]["name"]: trigger["metadata"]["threshold"]
        for scaler in manifests.of("ScaledObject")
        for trigger in scaler["spec"]["triggers"]
        if "_sessions{" in trigger["metadata"]["query"]
    }
    return {name: float(target) for name, target in targets.items()}


def own_load(deployment: str) -> set[str]:
    """Return the metrics of a Deployment's own pods by which it is scaled."""
    prefix = deployment.replace("-", "_")
    return {f"{prefix}_queue_depth", f"{prefix}_sessions"}


def queues(deployment: str) -> set[str]:
    """Return the metrics of other pods by which a Deployment is scaled: what waits for verifiers."""
    return {"specdec_gateway_waiting_requests"} if deployment == "specdec-verifier" else set()


class TestSelectors:
    def test_each_finds_the_pods_it_means(self, manifests: Manifests) -> None:
        for deployment in manifests.of("Deployment"):
            selector = deployment["spec"]["selector"]["matchLabels"]
            assert manifests.matching_pods(selector) == [deployment["spec"]["template"]]
            for spread in deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
                assert spread["labelSelector"]["matchLabels"] == selector
        for budget in manifests.of("PodDisruptionBudget"):
            pods = manifests.matching_pods(budget["spec"]["selector"]["matchLabels"])
            deployment = manifests.get("Deployment", budget["metadata"]["name"])
            assert pods == [deployment["spec"]["template"]]

    def test_services_reach_the_container_that_listens(self, cluster: Manifests) -> None:
        assert len(cluster.of("Service")) == 4
        for service in cluster.of("Service"):
            # Gateways have two: one address for all, and all addresses by one name.
            name = service["metadata"]["name"].removeprefix("specdec-").removesuffix("s")
            pod = pod_of(cluster, name)
            assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
            (container,) = (spec for spec in pod["spec"]["containers"] if spec["name"] == name)
            port, *others = service["spec"]["ports"]
            assert {"name": name, "containerPort": port["targetPort"]} in container["ports"]
            assert len(others) == (service["metadata"]["name"] == "specdec-gateway")
            for other in others:
                declared = {"name": f"{name}-{other['name']}", "containerPort": other["targetPort"]}
                assert declared in container["ports"]

    def test_clients_find_the_name_that_the_manual_tells(self, cluster: Manifests) -> None:
        readme = (DEPLOY / "README.md").read_text()
        (name,) = re.findall(r"dns:///([\w-]+)\.specdec:50050", readme)
        assert cluster.get("Service", name)["spec"]["clusterIP"] == "None"

    def test_nothing_names_what_is_not_there(self, cluster: Manifests) -> None:
        for pod in cluster.pod_specs():
            assert pod.get("serviceAccountName", "specdec-gateway") in cluster.names("ServiceAccount")
            for container in pod["containers"]:
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted <= {volume["name"] for volume in pod["volumes"]}
            for volume in pod["volumes"]:
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                assert claim is None or claim in cluster.names("PersistentVolumeClaim")
            for claim in pod.get("resourceClaims", []):
                assert claim["resourceClaimTemplateName"] in cluster.names("ResourceClaimTemplate")

    def test_all_is_in_one_namespace(self, cluster: Manifests) -> None:
        assert cluster.names("Namespace") == {"specdec"}
        places = {
            manifest["metadata"].get("namespace")
            for manifest in cluster.objects
            if manifest["kind"] != "Namespace"
        }
        assert places == {"specdec"}


class TestNetwork:
    def test_what_must_pass_passes_and_nothing_else(self, cluster: Manifests) -> None:
        pods = {
            name: Peer(pod_of(cluster, name)["metadata"]["labels"])
            for name in ("gateway", "verifier", "drafter")
        }
        ports = {container.service: container.port("LISTEN") for container in cluster.containers()}
        client = Peer({"specdec/client": "true"}, "somewhere")
        stranger = Peer({}, "somewhere")
        assert is_allowed(cluster, client, pods["gateway"], ports["gateway"])
        assert not is_allowed(cluster, stranger, pods["gateway"], ports["gateway"])
        http = next(c.port("HTTP_LISTEN") for c in cluster.containers() if c.service == "gateway")
        assert is_allowed(cluster, client, pods["gateway"], http)
        assert not is_allowed(cluster, stranger, pods["gateway"], http)
        needed = {("gateway", "verifier"), ("gateway", "drafter"), ("drafter", "verifier")}
        for source, source_pod in pods.items():
            for target, target_pod in pods.items():
                wanted = any(
                    (by, target) in needed and source_pod == pods[by]
                    for by in ("gateway", "verifier", "drafter")
                )
                assert is_allowed(cluster, source_pod, target_pod, ports[target]) is wanted, (source, target)
        for service in ("verifier", "drafter"):
            assert not is_allowed(cluster, client, pods[service], ports[service])

    def test_metrics_are_for_monitoring(self, cluster: Manifests) -> None:
        for container in cluster.containers():
            pod = Peer(pod_of(cluster, container.service)["metadata"]["labels"])
            port = container.port("METRICS_LISTEN")
            assert is_allowed(cluster, Peer({}, "monitoring"), pod, port)
            assert not is_allowed(cluster, Peer({}, "somewhere"), pod, port)

    def test_pods_may_ask_for_names_and_little_else(self, cluster: Manifests) -> None:
        names = Peer({"k8s-app": "kube-dns"}, "kube-system")
        web = Peer({}, "internet")
        for template in (
            workload["spec"]["template"] for workload in (*cluster.of("Deployment"), *cluster.of("Job"))
        ):
            pod = Peer(template["metadata"]["labels"])
            assert is_allowed(cluster, pod, names, 53, "UDP")
            assert is_allowed(cluster, pod, names, 53)
            fetches = "specdec/fetch-models" in pod.labels
            assert is_allowed(cluster, pod, web, 443) is fetches


class TestSecurity:
    def test_no_pod_sees_folders_of_its_node(self, cluster: Manifests) -> None:
        assert not host_paths(cluster)

    def test_podman_sees_its_shared_memory_alone(self) -> None:
        assert host_paths(overlay("podman")) == ["/dev/shm"]

    def test_pods_are_restricted(self, manifests: Manifests) -> None:
        for pod in manifests.pod_specs():
            assert pod["automountServiceAccountToken"] is False
            assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
            context = pod["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"] | {"runAsUser": 0} == {
                    "runAsUser": 0,
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert container["resources"].keys() >= {"requests", "limits"}
                assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])

    def test_processes_have_the_users_of_the_images(self, manifests: Manifests) -> None:
        for container in manifests.containers():
            # On a GPU that is shared, both services are one user.
            shares_gpu = container.has_gpu and len(container.pod["containers"]) > 1
            service = "verifier" if shares_gpu else container.service
            assert container.user == IMAGE_USERS[service]
            assert container.pod["securityContext"]["fsGroup"] == container.user[1]

    def test_no_variables_of_service_links(self, manifests: Manifests) -> None:
        assert all(pod["enableServiceLinks"] is False for pod in manifests.pod_specs())


class TestTls:
    def test_each_service_has_the_files_it_is_told_of(self, complete: Manifests) -> None:
        for container in complete.containers():
            (mount,) = (m for m in container.spec["volumeMounts"] if m["name"] == f"{container.service}-tls")
            (volume,) = (v for v in container.pod["volumes"] if v["name"] == mount["name"])
            issued = complete.get("Certificate", f"specdec-{container.service}")["spec"]
            assert volume["secret"]["secretName"] == issued["secretName"]
            given = {
                name: value
                for name, value in container.options.items()
                if re.search(r"_TLS_.*(?<!NAME)(?<!CALLERS)$", name)
            }
            assert {Path(path).parent for path in given.values()} == {Path(mount["mountPath"])}
            assert {Path(path).name for path in given.values()} == {"tls.crt", "tls.key", "ca.crt"}

    def test_every_port_has_tls_and_services_show_certificates(self, complete: Manifests) -> None:
        for container in complete.containers():
            assert container.option("TLS_CERTIFICATE")
            assert container.option("TLS_PRIVATE_KEY")
            assert bool(container.option("TLS_CLIENT_AUTHORITIES")) is (container.service != "gateway")
            assert bool(container.option("TLS_AUTHORITIES")) is (container.service != "verifier")
        protocols = {port["appProtocol"] for s in complete.of("Service") for port in s["spec"]["ports"]}
        assert protocols == {"https"}

    def test_certificates_carry_the_names_that_are_called(self, complete: Manifests) -> None:
        names = {
            certificate["metadata"]["name"]: certificate["spec"].get("dnsNames", [])
            for certificate in complete.of("Certificate")
        }
        for container in complete.containers():
            if container.service == "gateway":
                for service in ("verifier", "drafter"):
                    called = container.option(service.upper()).removeprefix("dns:///").partition(":")[0]
                    assert called in names[f"specdec-{service}"]
            if container.service == "drafter":
                # It calls verifiers by address.
                assert container.option("TLS_SERVER_NAME") in names["specdec-verifier"]
        for called in complete.names("Service"):
            assert called in names[called.removesuffix("s")]
        issuers = complete.names("Issuer")
        assert all(
            certificate["spec"]["issuerRef"]["name"] in issuers for certificate in complete.of("Certificate")
        )

    def test_the_gateway_alone_opens_sessions(self, complete: Manifests) -> None:
        names = {
            certificate["metadata"]["name"]: {
                certificate["spec"]["commonName"],
                *certificate["spec"].get("dnsNames", []),
            }
            for certificate in complete.of("Certificate")
        }
        gateways = set(complete.get("Certificate", "specdec-gateway")["spec"]["dnsNames"])
        others = set().union(*(found for name, found in names.items() if name != "specdec-gateway"))
        for container in complete.containers():
            if container.service != "gateway":
                callers = set(container.option("TLS_SESSION_CALLERS").split())
                assert callers
                assert callers <= gateways - others

    def test_pods_wait_for_their_certificates(self, complete: Manifests) -> None:
        for container in complete.containers():
            assert mounted_secrets(container)["/etc/specdec/tls"]["optional"] is False

    @pytest.mark.parametrize("name", ["h100-colocated", "h100-colocated-mps"])
    def test_they_do_so_whichever_component_comes_first(self, name: str, tmp_path: Path) -> None:
        shutil.copytree(KUBERNETES, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "overlays" / "h100-colocated" / "kustomization.yaml"
        kustomization = yaml.safe_load(path.read_text())
        kustomization["components"].append("../../components/tls")
        path.write_text(yaml.safe_dump(kustomization))
        self.test_pods_wait_for_their_certificates(Manifests(render(tmp_path / "overlays" / name)))

    def test_clients_are_given_a_certificate_and_no_authority_to_read(self, complete: Manifests) -> None:
        readme = (DEPLOY / "README.md").read_text()
        (name,) = re.findall(r"^kubectl get secret (\S+) .*\.data\.ca\\\.crt", readme, re.MULTILINE)
        certificates = [certificate["spec"] for certificate in complete.of("Certificate")]
        assert name in {
            certificate["secretName"] for certificate in certificates if not certificate.get("isCA")
        }

    def test_certificates_are_renewed_in_time(self, complete: Manifests) -> None:
        certificates = [certificate["spec"] for certificate in complete.of("Certificate")]
        (authority,) = (certificate for certificate in certificates if certificate.get("isCA"))
        leaves = [certificate for certificate in certificates if certificate is not authority]
        assert len(leaves) == 3
        for certificate in certificates:
            assert hours(certificate["renewBefore"]) < hours(certificate["duration"])
        # It signs until it is renewed; nothing it signed may outlive it, or not fit its successor's key.
        assert all(hours(certificate["duration"]) < hours(authority["renewBefore"]) for certificate in leaves)
        assert authority["privateKey"]["rotationPolicy"] == "Never"


class TestAuth:
    def test_the_gateway_takes_the_secret_the_readme_makes(self, complete: Manifests, tmp_path: Path) -> None:
        (gateway,) = (container for container in complete.containers() if container.service == "gateway")
        made = CliRunner().invoke(main, ["token", "alice"])
        (tmp_path / "tokens.toml").write_text(made.stdout)
        (line,) = re.findall(
            r"^kubectl (create secret .*?) \|", (DEPLOY / "README.md").read_text(), re.MULTILINE
        )
        command = [tool("kubectl"), *line.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        secret = yaml.safe_load(done.stdout)
        assert complete.names("Namespace") == {secret["metadata"]["namespace"]}
        path = Path(gateway.option("AUTH_TOKENS"))
        wanted = {"secretName": secret["metadata"]["name"]}
        # Not optional: without its tokens a gateway must not start.
        assert mounted_secrets(gateway)[str(path.parent)] == wanted
        assert all(
            wanted not in mounted_secrets(container).values()
            for container in complete.containers()
            if container.service != "gateway"
        )
        file = tmp_path / "mounted.toml"
        file.write_bytes(base64.b64decode(secret["data"][path.name]))
        caller = asyncio.run(
            TokenFile(file).authenticate({"authorization": f"Bearer {made.stderr.split()[-1]}"})
        )
        assert caller.name == "alice"


class TestHandles:
    def test_state_goes_by_handle_only_within_a_pod(self, manifests: Manifests) -> None:
        services = {container.service: container for container in manifests.containers()}
        verifier, drafter = services["verifier"], services["drafter"]
        one_pod = verifier.pod is drafter.pod
        assert verifier.option("TARGET_STATE") == drafter.option("TARGET_STATE")
        assert verifier.option("TARGET_STATE") == ("auto" if one_pod else "stream")
        if not one_pod:
            return
        group = str(verifier.user[1])
        assert verifier.option("SHARED_GROUP") == drafter.option("SHARED_GROUP") == group
        assert verifier.user[1] == drafter.user[1]
        # CUDA IPC works within a PID namespace and for one user; nothing else needs either.
        assert verifier.pod.get("shareProcessNamespace", False) is verifier.has_gpu
        assert (verifier.user == drafter.user) is verifier.has_gpu
        directory = verifier.option("SHARED_DIR")
        assert drafter.option("SHARED_DIR") == directory
        for container in (verifier, drafter):
            mounts = {mount["mountPath"]: mount["name"] for mount in container.spec["volumeMounts"]}
            assert mounts[directory] == "shared"
            (mount,) = (m for m in container.spec["volumeMounts"] if m["name"] == "shared")
            assert mount.get("readOnly", False) is (container is drafter)
            # That of MPS would take the place of a volume there.
            assert "/dev/shm" not in mounts

    def test_shared_memory_is_bounded(self, cluster: Manifests) -> None:
        (verifier,) = (container for container in cluster.containers() if container.service == "verifier")
        if verifier.option("TARGET_STATE") == "stream":
            return
        (volume,) = (volume for volume in verifier.pod["volumes"] if volume["name"] == "shared")
        assert volume["emptyDir"]["medium"] == "Memory"
        size = mib(volume["emptyDir"]["sizeLimit"])
        if not verifier.option("DEVICE").startswith("cuda"):
            assert float(verifier.option("KV_CACHE_MIB")) < size
        assert size < mib(verifier.spec["resources"]["limits"]["memory"])

    def test_one_gpu_is_shared_by_one_claim(self, manifests: Manifests) -> None:
        for pod in manifests.pod_specs():
            claims = {claim["name"] for claim in pod.get("resourceClaims", [])}
            for container in pod["containers"] if claims else []:
                assert {claim["name"] for claim in container["resources"]["claims"]} == claims
                assert "nvidia.com/gpu" not in container["resources"]["limits"]

    @pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("h100-colocated")])
    def test_it_is_shared_through_mps_where_the_overlay_says_so(self, name: str, extended: Path) -> None:
        manifests = variant(name, extended)
        devices = manifests.get("ResourceClaimTemplate", "specdec-gpu")["spec"]["spec"]["devices"]
        (request,) = devices["requests"]
        assert request["exactly"]["deviceClassName"] == "gpu.nvidia.com"
        for container in manifests.containers():
            for claim in container.spec["resources"].get("claims", []):
                assert claim.get("request", request["name"]) == request["name"]
        if "mps" not in name:
            assert "config" not in devices
            return
        (config,) = devices["config"]
        assert config["requests"] == [request["name"]]
        assert config["opaque"]["driver"] == "gpu.nvidia.com"
        assert config["opaque"]["parameters"]["sharing"]["strategy"] == "MPS"

    def test_whoever_computes_on_a_gpu_has_one(self, manifests: Manifests) -> None:
        for container in manifests.containers():
            assert container.has_gpu is container.option("DEVICE").startswith("cuda")

    def test_pods_with_a_gpu_may_run_where_others_are_kept_away(self, manifests: Manifests) -> None:
        tolerated = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        for container in manifests.containers():
            assert (tolerated in container.pod.get("tolerations", [])) is container.has_gpu


class TestScaling:
    def test_autoscalers_ask_for_metrics_that_exist(self, cluster: Manifests) -> None:
        scalers = cluster.of("HorizontalPodAutoscaler")
        for scaler in scalers:
            target = scaler["spec"]["scaleTargetRef"]["name"]
            assert "replicas" not in cluster.get("Deployment", target)["spec"], "it would be reset each time"
            wanted = {
                metric[metric["type"].lower()]["metric"]["name"]: metric["type"]
                for metric in scaler["spec"]["metrics"]
            }
            assert wanted == dict.fromkeys(own_load(target), "Pods") | dict.fromkeys(
                queues(target), "External"
            )
            assert wanted.keys() <= METRICS
        assert scalers or cluster.of("ScaledObject")

    def test_they_add_a_replica_before_all_slots_are_taken(self, cluster: Manifests) -> None:
        slots = {
            f"specdec-{container.service}": container.option("MAX_SESSIONS")
            for container in cluster.containers()
        }
        thresholds = sessions_thresholds(cluster)
        assert thresholds.keys() == replica_limits(cluster).keys()
        assert thresholds == {name: 0.75 * float(slots[name]) for name in thresholds}

    def test_slots_are_taken_before_memory_is(self, cluster: Manifests) -> None:
        """A session that finds no memory is refused, and no autoscaler hears of it."""
        services = {container.service: container for container in cluster.containers()}
        verifier, drafter = services["verifier"], services["drafter"]
        pools = [(verifier, "KV_CACHE_MIB", KV_KIB[verifier.option("MODEL")])]
        if drafter.option("MIRROR_MIB"):
            pools.append((drafter, "MIRROR_MIB", STREAMED_KIB))
        for container, size, kib_per_token in pools:
            num_tokens = float(container.option(size)) * 1024 / kib_per_token
            assert int(container.option("MAX_SESSIONS")) * LEAST_SESSION_TOKENS <= num_tokens

    def test_scaled_objects_take_their_place(self, complete: Manifests) -> None:
        assert not complete.of("HorizontalPodAutoscaler")
        scaled = complete.of("ScaledObject")
        # Each model service's pods, whether the two are in one pod or not.
        targets = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in scaled}
        assert targets == complete.names("Deployment") - {"specdec-gateway"}
        for scaler in scaled:
            queries = [trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"]]
            used = {name for query in queries for name in re.findall(r"specdec_\w+", query)}
            target = scaler["spec"]["scaleTargetRef"]["name"]
            assert used == own_load(target) | queues(target)
            assert used <= METRICS

    @pytest.mark.parametrize("name", CLUSTER_OVERLAYS)
    def test_limits_are_the_overlays_with_either(self, name: str, extended: Path) -> None:
        limits = replica_limits(overlay(name))
        assert limits
        assert replica_limits(variant(f"{name}+all", extended)) == limits

    @pytest.mark.parametrize("name", ["cpu", "cpu+all"])
    def test_cpu_and_its_rollout_fit_a_node_of_four(self, name: str, extended: Path) -> None:
        manifests = variant(name, extended)
        limits = replica_limits(manifests)
        total = 0.0
        for deployment in manifests.of("Deployment"):
            spec = deployment["spec"]
            num_replicas = spec.get("replicas") or limits[deployment["metadata"]["name"]][0]
            requests = [
                container["resources"]["requests"] for container in spec["template"]["spec"]["containers"]
            ]
            num_pods = num_replicas + spec["strategy"]["rollingUpdate"]["maxSurge"]
            total += num_pods * sum(cpus(request["cpu"]) for request in requests)
        assert total <= 3, "a node keeps some for itself"

    def test_the_adapter_knows_what_autoscalers_ask_for(self) -> None:
        rules = yaml.safe_load((DEPLOY / "prometheus" / "adapter-rules.yaml").read_text())["rules"]
        pattern = re.search(r'__name__=~"([^"]+)"', rules[0]["seriesQuery"])
        assert pattern
        known = {name for name in METRICS if re.fullmatch(pattern[1], name)}
        assert known == {
            f"specdec_{service}_{what}"
            for service in ("verifier", "drafter")
            for what in ("queue_depth", "sessions")
        }

    def test_the_adapter_knows_the_gateways_queue(self) -> None:
        rules = yaml.safe_load((DEPLOY / "prometheus" / "adapter-rules.yaml").read_text())["externalRules"]
        assert {rule["seriesQuery"].partition("{")[0] for rule in rules} == queues("specdec-verifier")

    @pytest.mark.parametrize("variant_name", ["split", "split+all"])
    def test_drafters_and_verifiers_of_split_are_on_different_nodes(
        self, variant_name: str, extended: Path
    ) -> None:
        split = variant(variant_name, extended)
        for name, other in (("verifier", "drafter"), ("drafter", "verifier")):
            affinity = pod_of(split, name)["spec"]["affinity"]
            (rule,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert rule["topologyKey"] == "kubernetes.io/hostname"
            assert split.matching_pods(rule["labelSelector"]["matchLabels"]) == [pod_of(split, other)]


class TestMonitoring:
    def test_every_metrics_port_is_scraped(self, complete: Manifests) -> None:
        (monitor,) = complete.of("PodMonitor")
        scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        for container in complete.containers():
            labels = pod_of(complete, container.service)["metadata"]["labels"]
            assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
            names = {port["containerPort"]: port["name"] for port in container.spec["ports"]}
            assert names[container.port("METRICS_LISTEN")] in scraped

    def test_the_rules_are_those_of_the_repository(self, complete: Manifests) -> None:
        (rule,) = complete.of("PrometheusRule")
        rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
        assert rule["spec"] == rules, "run `make prometheus-rule`"

    def test_telemetry_may_leave(self, complete: Manifests) -> None:
        for container in complete.containers():
            pod = Peer(pod_of(complete, container.service)["metadata"]["labels"])
            assert is_allowed(complete, pod, Peer({}, "monitoring"), 4317)


def test_jobs_do_not_stay_in_the_way_of_the_next_apply(cluster: Manifests) -> None:
    """A Job's pods cannot be changed; the Job can be applied again once it is gone."""
    for job in cluster.of("Job"):
        assert job["spec"].get("ttlSecondsAfterFinished", math.inf) <= 3600


@pytest.mark.parametrize("name", sorted(path.name for path in (KUBERNETES / "components").iterdir()))
def test_every_component_is_used(name: str, extended: Path) -> None:
    kustomizations = (path.read_text() for path in extended.glob("overlays/*/kustomization.yaml"))
    assert any(f"../../components/{name}" in text for text in kustomizations)

#!/usr/bin/env bash
# Build the images, render the overlay podman, run it in real pods and check it (check.py says what).
# Needs podman, runc, conmon, catatonit, netavark, aardvark-dns and, for its port on the host, iptables; and root.
#   PODMAN_BUILD_ARGS   more arguments of `podman build`, such as --build-arg PIP_EXTRA_INDEX_URL=... or a volume of wheels
#   SKIP_BUILD=1        take the images as they are
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
network=specdec
cleanup() {
    podman network rm --force "$network" > /dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT

# Runs without systemd, and where containers may have no higher limits than this process.
files=$(ulimit -Hn)
cat > "$work/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=$files:$files", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
CONF
export CONTAINERS_CONF=$work/containers.conf

if [[ -z ${SKIP_BUILD:-} ]]; then
    podman image exists python:3.11-slim-bookworm \
        || podman pull python:3.11-slim-bookworm || deploy/podman/make_base_image.sh
    for service in gateway verifier drafter; do
        # Arguments, not one argument.
        # shellcheck disable=SC2086
        podman build --quiet --network host --ulimit "nofile=$files:$files" ${PODMAN_BUILD_ARGS:-} \
            --file deploy/Dockerfile --build-arg "SERVICE=$service" --tag "specdec-$service:0.2.0" .
    done
fi
podman images --filter "reference=specdec-*" --format '{{.Repository}}:{{.Tag}} {{.Size}}'

.venv/bin/kubectl kustomize deploy/kubernetes/overlays/podman > "$work/podman.yaml"
podman network exists "$network" || podman network create "$network" > /dev/null
python3 deploy/podman/check.py "$work/podman.yaml"

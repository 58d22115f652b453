"""Runs the rendered overlay podman and checks it; run.sh makes images and manifests, and calls this.

Needs Python alone: the client is the gateway's image, in a container of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORK = "specdec"
GATEWAY = "specdec-gateway:50050"
CLIENT_IMAGE = "specdec-gateway:0.2.0"
PROMPT = "Write a long story about a lighthouse keeper, her daughter and the sea."
NUM_TOKENS = 2000
"""So many that a session lives longer than another pod takes to become ready."""
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 150
"""As terminationGracePeriodSeconds."""


def say(text: str) -> None:
    """Print a line of the report with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


def check(is_right: bool, what: str) -> None:
    """Report what was found; end with an error if it is not as it must be."""
    say(f"{'ok  ' if is_right else 'FAIL'} {what}")
    if not is_right:
        sys.exit(1)


def podman(*arguments: str) -> str:
    """Run a podman command and return its standard output; fail if the command fails."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"podman {' '.join(arguments)} failed ({done.returncode}): {done.stdout}{done.stderr}")
    return done.stdout


def client(*arguments: str) -> list[str]:
    """Return the command line that runs a client in a container."""
    run = ["podman", "run", "--rm", "--network", NETWORK, "--read-only", "--cap-drop", "all"]
    return [*run, "--entrypoint", "specdec", CLIENT_IMAGE, *arguments, "--gateway", GATEWAY]


class BackgroundGeneration:
    """A generation that runs in the background."""

    def __init__(self) -> None:
        size = ("--max-new-tokens", str(NUM_TOKENS), "--ignore-eos", "--timeout", "600")
        command = client("generate", PROMPT, *size, "--json")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @property
    def is_running(self) -> bool:
        """Whether the generation's last token has not come yet."""
        return self._process.poll() is None

    def result(self) -> dict[str, Any]:
        """Return the answer once it is complete."""
        out, _ = self._process.communicate()
        check(self._process.returncode == 0, f"the client ended with {self._process.returncode}")
        answer: dict[str, Any] = json.loads(out)
        return answer


def info() -> dict[str, Any]:
    """Return what `specdec info` shows; it is empty while no gateway answers."""
    done = subprocess.run(client("info", "--json"), capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def wait_for(condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """Wait until the system meets the condition, and return its info."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        found = info()
        if found and condition(found):
            say(f"ok   {what}")
            return found
        time.sleep(0.5)
    sys.exit(f"Not seen in {READY_TIMEOUT_S:g} s: {what}. Last: {json.dumps(found, indent=1)}")


def num_ready(count: int) -> Callable[[dict[str, Any]], bool]:
    """Return a condition that holds once that many verifiers and as many drafters are ready."""

    def is_met(found: dict[str, Any]) -> bool:
        return all(
            sum(replica["ready"] for replica in found[kind]) == count for kind in ("verifiers", "drafters")
        )

    return is_met


def sessions(found: dict[str, Any], kind: str) -> list[int]:
    """Return the gateway's sessions on each replica that is ready, in ascending order."""
    return sorted(replica["num_sessions"] for replica in found[kind] if replica["ready"])


def storages(found: dict[str, Any]) -> list[str]:
    """Return how the running sessions of all drafters read target state."""
    return [
        link["storage"]
        for drafter in found["drafters"]
        if drafter["info"]
        for link in drafter["info"]["state_links"]
    ]


class Pod:
    """A Deployment of the manifests, with the maps it uses, as one pod."""

    def __init__(self, manifests: Path, deployment: str, suffix: str = "") -> None:
        documents = manifests.read_text().split("\n---\n")
        pod = next(d for d in documents if re.search(rf"kind: Deployment\n(.*\n)*?  name: {deployment}\n", d))
        maps = [d for d in documents if "kind: ConfigMap" in d]
        self._path = manifests.with_name(f"{deployment}{suffix}.yaml")
        pod = re.sub(rf"(  name: {deployment})\n", rf"\1{suffix}\n", pod)
        # What has ended stays so, and can be looked at.
        pod = pod.replace("\n    spec:\n", "\n    spec:\n      restartPolicy: Never\n", 1)
        self._path.write_text("\n---\n".join([*maps, pod]))
        self._alias = deployment
        self.name = f"{deployment}{suffix}-pod-0"
        self._containers: list[str] = []
        self._terminated_at = 0.0

    def start(self) -> None:
        """Start the pod; its alias in the network is the Deployment's name, as a Service's would be."""
        podman("kube", "play", "--network", f"{NETWORK}:alias={self._alias}", str(self._path))
        say(f"     {self.name} started")

    def terminate(self) -> None:
        """Send SIGTERM to the containers alone, as a kubelet does.

        `podman stop` (4.3) ends the one that holds the pod's processes, and so all, as soon as one of two
        has ended.
        """
        listing = podman("ps", "--filter", f"pod={self.name}", "--format", "{{.Names}}").split()
        self._containers = [name for name in listing if not name.endswith("-infra")]
        self._terminated_at = time.monotonic()
        podman("kill", "--signal", "TERM", *self._containers)

    def wait_until_ended(self) -> None:
        """Check that all containers drain and end by themselves within the grace period."""
        deadline = self._terminated_at + STOP_TIMEOUT_S
        # One that has died is "stopped" until podman has cleaned up after it.
        while not has_exited(ends := self._ends()) and time.monotonic() < deadline:
            time.sleep(0.2)
        say(f"     {self.name} stopped after {time.monotonic() - self._terminated_at:.1f} s")
        check(set(ends.values()) == {"exited 0"}, f"all have ended by themselves: {ends}")

    def _ends(self) -> dict[str, str]:
        form = "{{.State.Status}} {{.State.ExitCode}}"
        states = podman("inspect", "--format", form, *self._containers).splitlines()
        return dict(zip(self._containers, states, strict=True))

    def remove(self) -> None:
        """Remove the pod, whatever state it is in."""
        remove = ["podman", "pod", "rm", "--force", "--time", "0", self.name]
        subprocess.run(remove, capture_output=True, check=False)


def has_exited(ends: dict[str, str]) -> bool:
    """Return whether every container has exited, with or without an error."""
    return all(end.startswith("exited") for end in ends.values())


def same_text(answer: dict[str, Any], undisturbed: dict[str, Any], when: str) -> None:
    """Check that no text was lost and none came twice."""
    same = answer["token_ids"] == undisturbed["token_ids"] and answer["text"] == undisturbed["text"]
    detail = f"{len(answer['token_ids'])} tokens, {answer['num_failovers']} failovers"
    check(same, f"the answer {when} is the undisturbed one ({detail})")


def run(gateway: Pod, first: Pod, second: Pod) -> None:
    """Run all steps of the check, one after the other."""
    first.start()
    gateway.start()
    found = wait_for(num_ready(1), "a verifier and a drafter are ready")
    say(f"     methods: {', '.join(found['methods'])}")

    undisturbed = BackgroundGeneration().result()
    speculation = undisturbed["speculation"]
    say(f"     method {speculation['method']}, acceptance length {speculation['mean_acceptance_length']:.2f}")
    say(f"     answer: {undisturbed['text'][:160]!r} ...")

    say("== Target state")
    live = BackgroundGeneration()
    found = wait_for(lambda found: bool(storages(found)), "a session reads target state")
    check(storages(found) == ["shared_memory"], f"it is read by handle: {storages(found)}")

    say("== Out: a second pod of verifier and drafter, while the session lives")
    second.start()
    wait_for(num_ready(2), "two verifiers and two drafters are ready")
    check(live.is_running, "the session on the first is still live")
    other = BackgroundGeneration()
    found = wait_for(
        lambda found: sessions(found, "verifiers") == [1, 1] and len(storages(found)) == 2,
        "the new session is on the new verifier",
    )
    drafters = sessions(found, "drafters")
    num_proposers = len(speculation["method"].split("+"))
    check(drafters == [num_proposers] * 2, f"each has the drafter of its own pod: {drafters}")
    check(storages(found) == ["shared_memory"] * 2, f"both are read by handle: {storages(found)}")

    say("== In: the first pod gets SIGTERM, while its session lives")
    check(live.is_running and other.is_running, "both sessions are live")
    first.terminate()
    first.wait_until_ended()
    same_text(live.result(), undisturbed, "that went on through the drain of verifier and drafter")
    same_text(other.result(), undisturbed, "beside it")
    wait_for(num_ready(1), "one verifier and one drafter are left")

    say("== The gateway gets SIGTERM, while a session lives")
    live = BackgroundGeneration()
    wait_for(lambda found: sessions(found, "verifiers") == [1], "a session is live")
    gateway.terminate()
    is_refused = not info()
    check(is_refused and live.is_running, "no new request is taken, while the session is still live")
    gateway.wait_until_ended()
    same_text(live.result(), undisturbed, "that went on through the drain of the gateway")


def main(manifests: Path) -> None:
    """Run all steps, and leave nothing behind."""
    pods = (
        Pod(manifests, "specdec-gateway"),
        Pod(manifests, "specdec-verifier"),
        Pod(manifests, "specdec-verifier", "-b"),
    )
    for pod in pods:
        pod.remove()
    try:
        run(*pods)
    finally:
        for pod in pods:
            pod.remove()
    say("All as it must be.")


if __name__ == "__main__":
    STARTED = time.monotonic()
    main(Path(sys.argv[1]))

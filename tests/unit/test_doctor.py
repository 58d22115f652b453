"""What `specdec doctor` finds, from facts as machines had them; and what it reads of this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from specdec.doctor import checks
from specdec.doctor.checks import Level, diagnose
from specdec.doctor.facts import Facts, Library, TorchFacts, _left_in_cgroups, read_facts
from specdec.local.state_file import SystemState, write_state

GIB = 2**30
TORCH = TorchFacts("2.13.0+cpu", "", "this torch was built for CPUs", is_gpu_usable=False, has_kernels=True)
CUDA_TORCH = TorchFacts("2.13.0", "13.0", "", is_gpu_usable=True, has_kernels=True)
GRPC = Library("grpcio", "1.85.1", ">=1.85.1,<2", is_wanted=True, pinned="1.85.1")
FINE = Facts(
    busy_cores=0.05,
    num_cores=2,
    quota=None,
    cpu="x86_64",
    cpu_flags=frozenset({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
    shared_dir="/dev/shm",
    shared_free_bytes=12 * GIB,
    available_bytes=16 * GIB,
    open_files=1024,
    most_open_files=1048576,
    torch=TORCH,
    libraries=(GRPC, Library("torch", "2.13.0+cpu", "==2.13.0", is_wanted=True, pinned="2.13.0")),
)
"""Two cores of a Xeon, as continuous integration has them."""
OLD_CPU = frozenset({"sse4_2", "avx", "avx2", "fma"})
SERVICES = {"gateway": True, "verifier": True, "drafter": True}


def test_a_machine_that_is_fine_has_nothing_to_be_done() -> None:
    findings = diagnose(FINE)
    assert {finding.level for finding in findings} == {Level.OK}
    assert not any(finding.do for finding in findings)
    assert len({finding.name for finding in findings}) == len(findings) == len(checks.CHECKS)


@pytest.mark.parametrize(
    ("name", "changes", "level", "says", "do"),
    [
        ("busy cores", {"busy_cores": 1.02}, "warning", "1.0 of 2 cores busy", "taskset"),
        ("cores", {"num_cores": 32, "quota": 4}, "warning", "32 cores.* the time of 4", "--cpuset-cpus"),
        ("cores", {"num_cores": 1}, "warning", "one core", "--drafter ngram-lm"),
        ("processor", {"cpu_flags": OLD_CPU}, "warning", "neither AVX512 nor AMX", "AVX512-BF16 or AMX"),
        (
            "processor",
            {"cpu_flags": OLD_CPU | {"avx512f"}},
            "warning",
            "neither AVX512-BF16 nor AMX",
            "bench run",
        ),
        ("processor", {"cpu": "aarch64", "cpu_flags": frozenset({"asimd"})}, "warning", "aarch64", "GPU"),
        ("torch", {"torch": None}, "warning", "not installed", r"specdec\[models\]"),
        (
            "torch",
            {"torch": None, "torch_error": "OSError: libcudart.so.13: cannot open shared object file"},
            "problem",
            "libcudart.so.13",
            "Install it anew",
        ),
        ("kernels", {"torch": replace(TORCH, has_kernels=False)}, "warning", "not built", "gcc"),
        ("shared memory", {"shared_free_bytes": 64 * 2**20}, "warning", "has 64 MiB free", "--shm-size"),
        ("shared memory", {"shared_free_bytes": None}, "warning", "cannot be written to", "--shared-dir"),
        ("memory", {"available_bytes": GIB}, "problem", "1.0 GiB", "--kv-cache-mib"),
        ("GPU", {"gpu": "NVIDIA H200, 580.65"}, "warning", "H200.*built for CPUs", "built for CUDA"),
        (
            "GPU",
            {
                "gpu": "Tesla V100, 470.82",
                "torch": replace(CUDA_TORCH, is_gpu_usable=False, gpu_error="the driver is too old"),
            },
            "warning",
            "V100.*CUDA 13.0.*too old",
            "driver for CUDA 13.0",
        ),
        (
            "libraries",
            {"libraries": (replace(GRPC, installed="1.60.0", is_wanted=False),)},
            "problem",
            r"grpcio 1.60.0 \(>=1.85.1,<2\)",
            "anew",
        ),
        (
            "libraries",
            {"libraries": (replace(GRPC, installed="", is_wanted=False),)},
            "problem",
            "grpcio is missing",
            "pip install",
        ),
        (
            "libraries",
            {"libraries": (replace(GRPC, installed="1.86.0"),)},
            "warning",
            r"grpcio 1.86.0 \(1.85.1\)",
            "constraints.txt",
        ),
        ("open files", {"open_files": 256}, "warning", "256 files", "ulimit -n 1024"),
        ("open files", {"open_files": 256, "most_open_files": 512}, "warning", "256 files", "limits.conf"),
        (
            "services",
            {"system": SERVICES | {"verifier": False}, "logs": "/run/specdec/logs"},
            "problem",
            "verifier do not answer",
            "/run/specdec/logs/verifier.log",
        ),
        (
            "services",
            {"system_error": "/run/specdec cannot be used."},
            "problem",
            "cannot be used",
            "SPECDEC_STATE_DIR",
        ),
    ],
)
def test_each_finding_says_what_there_is_and_what_to_do(
    name: str, changes: dict[str, Any], level: str, says: str, do: str
) -> None:
    (finding,) = [each for each in diagnose(replace(FINE, **changes)) if each.level is not Level.OK]
    assert (finding.name, finding.level) == (name, level)
    assert re.search(says, finding.says)
    assert re.search(do, finding.do)
    assert finding.says.endswith(".")


def test_what_is_not_wrong() -> None:
    healthy = replace(FINE, system=SERVICES, available_bytes=GIB, shared_free_bytes=2**20)
    assert {finding.level for finding in diagnose(healthy)} == {Level.OK}, "the services have their memory"
    with_gpu = replace(FINE, gpu="NVIDIA H200, 580.65", torch=CUDA_TORCH)
    (gpu,) = [finding for finding in diagnose(with_gpu) if finding.name == "GPU"]
    assert (gpu.level, "--device cuda:0" in gpu.says) == (Level.OK, True)
    gateway_only = replace(FINE, torch=None, gpu="NVIDIA H200, 580.65")
    assert [each.name for each in diagnose(gateway_only) if each.level is not Level.OK] == ["torch"]


def test_what_is_left_in_cgroups(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    (tmp_path / "a" / "memory.max").write_text("100\n")
    (tmp_path / "a" / "memory.current").write_text("70\n")
    assert list(_left_in_cgroups(tmp_path, membership)) == [30]
    assert not list(_left_in_cgroups(tmp_path, tmp_path / "none"))


def test_what_is_read_of_this_machine() -> None:
    facts = read_facts()
    assert 0 <= facts.busy_cores <= facts.num_cores == len(os.sched_getaffinity(0))
    assert 0 < facts.available_bytes <= psutil.virtual_memory().total
    assert facts.open_files > 0
    assert facts.torch
    assert facts.torch.version.startswith("2.13")
    names = {library.name for library in facts.libraries}
    assert {"grpcio", "click", "torch"} <= names
    assert not {"mypy", "matplotlib"} & names, "what tests and plots need is nobody else's concern"
    assert all(library.is_wanted for library in facts.libraries)
    assert {library.name for library in facts.libraries if library.pinned} >= {"grpcio", "click", "protobuf"}
    assert "avx2" in facts.cpu_flags or facts.cpu != "x86_64"


def run(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SPECDEC_STATE_DIR": str(state)}
    command = [sys.executable, "-m", "specdec", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_says_all_of_it_and_fails_only_where_something_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(tmp_path, "--json")
    told = json.loads(done.stdout)
    assert [finding["name"] for finding in told["findings"]] == [finding.name for finding in diagnose(FINE)]
    assert (done.returncode, told["num_problems"]) == (0, 0)
    # Services that are noted, of a supervisor that lives, and that answer nobody.
    monkeypatch.setenv("SPECDEC_STATE_DIR", str(tmp_path))
    nowhere = "127.0.0.1:1"
    started_at = psutil.Process().create_time()
    write_state(SystemState(os.getpid(), started_at, nowhere, nowhere, nowhere, {}, str(tmp_path / "logs")))
    done = run(tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("problem"))
    assert "gateway and verifier and drafter do not answer" in lines[at]
    assert "Do this: Look at the end of" in lines[at + 1]
    assert sum(line.startswith("ok ") for line in lines) >= 5

"""How long idle OpenMP threads spin goes by the CPU, how many there are by the container's quota."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from specdec.service import tuning


@pytest.mark.parametrize(("vendor", "count"), [("GenuineIntel", "10000"), ("AuthenticAMD", "2000")])
def test_the_vendor_decides(monkeypatch: pytest.MonkeyPatch, vendor: str, count: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    assert tuning.spin_count() == count


def test_without_a_description_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    assert tuning.spin_count() == "10000"


V2, V1 = "0::{}\n", "5:memory:/elsewhere\n4:cpu,cpuacct:{}\n1:name=systemd:/\n"
V1_PERIOD = "cpu.cfs_period_us"


def cgroups(folder: Path, membership: str, files: Mapping[str, str]) -> tuple[Path, Path]:
    """Make cgroup files up; return where they are mounted, and the file with those of the process."""
    root, of_process = folder / "cgroup", folder / "membership"
    of_process.write_text(membership)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root, of_process


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2.format("/"), {"cpu.max": "200000 100000\n"}, 2),
        (V2.format("/"), {"cpu.max": "max 100000\n"}, None),
        (V2.format("/"), {}, None),
        (V2.format("/"), {"cpu.max": "290000 100000\n"}, 2),
        (V2.format("/"), {"cpu.max": "50000 100000\n"}, 1),
        (V2.format("/pod/box"), {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "300000 100000\n"}, 3),
        (V2.format("/pod/box"), {"pod/box/cpu.max": "100000 50000", "pod/cpu.max": "300000 100000"}, 2),
        (V2.format("/pod/box"), {"other/cpu.max": "100000 100000\n"}, None),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "400000\n", f"cpu/{V1_PERIOD}": "100000\n"}, 4),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1\n", f"cpu/{V1_PERIOD}": "100000\n"}, None),
        (V1.format("/docker/7f"), {"cpu/cpu.cfs_quota_us": "150000", f"cpu/{V1_PERIOD}": "100000"}, 1),
        (V1.format("/box"), {"cpu/box/cpu.cfs_quota_us": "300000", f"cpu/box/{V1_PERIOD}": "100000"}, 3),
    ],
)
def test_the_quota_of_a_container_is_found(
    tmp_path: Path, membership: str, files: Mapping[str, str], expected: int | None
) -> None:
    assert tuning.cpu_quota(*cgroups(tmp_path, membership, files)) == expected


def test_without_cgroups_there_is_no_quota(tmp_path: Path) -> None:
    assert tuning.cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has one thread in any case")
@pytest.mark.parametrize(("own", "expected"), [({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_a_process_has_as_many_threads_as_its_quota_allows(
    tmp_path: Path, own: Mapping[str, str], expected: str
) -> None:
    root, membership = cgroups(tmp_path, V2.format("/"), {"cpu.max": "100000 100000\n"})
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom specdec.service.tuning import tune_process\n"
        "tune_process(*map(Path, sys.argv[1:]))\nprint(os.environ['OMP_NUM_THREADS'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | own
    result = subprocess.run(
        [sys.executable, "-c", program, str(root), str(membership)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert result.stdout.strip() == expected

"""The wheel, built from the sources and installed beside the dependencies alone: it has all that it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("specdec", "gateway", "verifier_service", "drafter_service")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")
COMMANDS = ("specdec", "specdec-gateway", "specdec-verifier", "specdec-drafter")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in an environment that does not know of the sources, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("gcc", "cc"))


@dataclass(frozen=True)
class Installed:
    """A wheel and the virtual environment that it is installed in."""

    wheel: Path
    root: Path

    def run(self, program: str, *arguments: str) -> str:
        return run(self.root / "bin" / program, *arguments, cwd=self.root)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("wheel")
    sources, root = folder / "sources", folder / "environment"
    # A copy: a build leaves folders behind, and takes up what earlier builds left.
    for package in PACKAGES:
        skipped = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(REPOSITORY / package, sources / package, ignore=skipped)
    for name in PROJECT_FILES:
        shutil.copy(REPOSITORY / name, sources)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, sources, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=folder)
    python = root / "bin" / "python"
    run(*pip, "--python", python, "install", *offline, "--no-compile", wheel, cwd=folder)
    # The dependencies come after the package itself. Python reads no .pth files in a folder that a .pth file
    # names, so the editable installation there is not seen.
    (site_packages,) = root.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    yield Installed(wheel, root)
    shutil.rmtree(folder)


def test_it_has_every_file_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    packaged = {name for name in sizes if ".dist-info/" not in name}
    files = {
        path.relative_to(REPOSITORY).as_posix(): path.stat().st_size
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == files.keys()
    # A library that is built elsewhere may differ, in the paths that it keeps for debuggers.
    assert {name: sizes[name] for name in packaged if not name.endswith(".so")} == {
        name: size for name, size in files.items() if not name.endswith(".so")
    }
    for name in ("specdec/py.typed", "specdec/bench/prompts.jsonl", "specdec/bench/trace.json"):
        assert name in packaged
    assert sum(name.endswith("/model.safetensors") for name in packaged) == 2
    (licence,) = (name for name in sizes if name.endswith(".dist-info/licenses/LICENSE"))
    assert sizes[licence] == (REPOSITORY / "LICENSE").stat().st_size


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(installed: Installed, command: str) -> None:
    assert installed.run(command, "--help").startswith(f"Usage: {command} ")


@pytest.mark.parametrize("group", ["bench", "train"])
def test_commands_of_other_packages_are_found(installed: Installed, group: str) -> None:
    assert installed.run("specdec", group, "--help").startswith(f"Usage: specdec {group} ")


@pytest.mark.parametrize("service", ["gateway", "verifier", "drafter"])
def test_services_are_found(installed: Installed, service: str) -> None:
    script = f"from specdec.local.launcher import service_module; print(service_module({service!r}))"
    module = installed.run("python", "-c", script).strip()
    assert f"python -m {module}" in installed.run("python", "-m", module, "--help")


def test_the_code_and_the_weights_are_its_own(installed: Installed) -> None:
    script = (
        "import specdec, drafter_service\n"
        "from drafter_service.config import DrafterConfig\n"
        "from drafter_service.families import load_drafters\n"
        "print(*load_drafters(DrafterConfig(drafter=('ngram-lm',))))\n"
        "print(specdec.__file__, drafter_service.__file__, specdec.__version__)\n"
    )
    drafters, places = installed.run("python", "-c", script).splitlines()
    assert drafters == "ngram-lm"
    assert places.count(str(installed.root)) == 2
    assert f"-{places.split()[-1]}-" in installed.wheel.name


def test_the_kernels_are_built(installed: Installed) -> None:
    script = "from specdec.runtime.kernels import library; print(library.LIBRARY is not None)"
    assert installed.run("python", "-c", script).strip().endswith("True") == has_compiler()

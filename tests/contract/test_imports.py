"""Who may import whom: services stand alone, and what clients and the gateway import needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "verifier_service", "drafter_service")
PACKAGES = ("specdec", *SERVICES)
OURS = {*PACKAGES, "tests"}
HEAVY = {"torch", "transformers"}

SOURCES = sorted(
    path.relative_to(REPOSITORY)
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
    if "v1" not in path.parts
)


def parse(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text())


def imported_packages(nodes: Iterator[ast.AST], path: Path) -> set[str]:
    """Top-level packages the import statements among `nodes` name."""
    packages = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add((node.module or "").partition(".")[0] if not node.level else path.parts[0])
    return packages


def module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not TYPE_CHECKING blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *module_level(other))
            continue
        yield child
        yield from module_level(child)


def test_every_package_is_looked_at() -> None:
    assert {path.parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_packages_import_only_what_is_below_them(path: Path) -> None:
    package = path.parts[0]
    allowed = {package, "specdec"}
    ours = imported_packages(ast.walk(parse(path)), path) & OURS
    assert ours <= allowed, f"{path} may import {allowed}, not {ours - allowed}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_torch_is_imported_only_where_models_run(path: Path) -> None:
    imported = imported_packages(ast.walk(parse(path)), path)
    loaded_at_import = imported_packages(module_level(parse(path)), path)
    if path.parts[0] == "gateway":
        assert not imported & HEAVY
    elif path.parts[0] == "specdec" and path.parts[1] != "runtime":
        assert not loaded_at_import & HEAVY


def test_the_rules_see_what_they_must() -> None:
    source = ast.parse(
        "import torch.nn\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import numpy\n"
        "try:\n    from transformers import x\nexcept ImportError:\n    pass\n"
        "class A:\n    import json\n"
        "def f():\n    import gateway.cli\n"
    )
    here = Path("specdec/here.py")
    assert imported_packages(module_level(source), here) == {"torch", "typing", "transformers", "json"}
    assert imported_packages(ast.walk(source), here) >= {"gateway", "numpy"}
    assert imported_packages(ast.walk(ast.parse("from . import x")), here) == {"specdec"}


def run(script: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_clients_and_the_gateway_load_no_torch() -> None:
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.parts[0] == "gateway" and path.name != "__main__.py"
    ]
    assert len(modules) > 8
    run(
        f"import sys, {', '.join(modules)}, specdec.client, specdec.cli, specdec.server\n"
        "heavy = {'torch', 'transformers', 'numpy', 'verifier_service', 'drafter_service'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_clients_and_the_gateway_work_where_torch_is_not_installed(tmp_path: Path) -> None:
    run(
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'safetensors', 'gguf'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import gateway.server, gateway.cli, specdec.client, specdec.cli, specdec.launcher\n"
        "from gateway.config import GatewayConfig\n"
        "from specdec.telemetry import make_telemetry\n"
        "import asyncio\n"
        "async def main():\n"
        "    config = GatewayConfig(listen='127.0.0.1:0')\n"
        "    server = gateway.server.GatewayServer(config, make_telemetry('gateway'))\n"
        "    await server.host.start()\n"
        "    await server.host.stop(0)\n"
        "    await server.close()\n"
        "asyncio.run(main())\n"
        "try:\n"
        "    import torch\n"
        "except ModuleNotFoundError:\n"
        "    sys.exit(0)\n"
        "sys.exit('the finder does not hide torch')\n"
    )


@pytest.mark.parametrize("service", ["drafter_service.server", "drafter_service.registry"])
def test_drafters_without_a_model_load_no_torch(service: str) -> None:
    run(
        f"import sys, {service}\n"
        "from drafter_service.config import DrafterConfig\n"
        "from drafter_service.registry import load_drafters\n"
        "names = ('ngram', 'ngram-lm')\n"
        "assert tuple(load_drafters(DrafterConfig(drafter=names))) == names\n"
        "assert 'torch' not in sys.modules"
    )

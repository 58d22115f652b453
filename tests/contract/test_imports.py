"""Who may import whom: rooms lie in levels, services stand alone, clients and gateway need no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "verifier_service", "drafter_service")
PACKAGES = ("specdec", *SERVICES)
HEAVY = {"torch", "transformers"}

LEVELS = (
    {"v1"},
    {"contract"},
    {"errors", "transport", "models"},
    {"service", "runtime", "local"},
    {"state", "client", "doctor"},
    {"cli", "testing"},
    {"bench", "__main__"},
)
"""The rooms of `specdec`, from the ground up. Each may import those below it and itself."""

GATEWAY_LEVELS = (
    {"config"},
    {"rounds"},
    {"metrics", "place"},
    {"replicas", "callers", "waiting"},
    {"request"},
    {"generations"},
    {"service", "http"},
    {"server"},
    {"cli"},
)
"""The same of the gateway."""

TORCH_ROOMS = {"specdec.runtime", "specdec.state", "specdec.models.convert_gguf"}
"""What may load torch when it is imported, besides the two model services."""

SOURCES = sorted(
    path.relative_to(REPOSITORY)
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
    if "v1" not in path.parts
)


def parse(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text())


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_modules(nodes: Iterator[ast.AST]) -> set[str]:
    """Return what the import statements among `nodes` name: modules, and names that may be modules."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported: not function bodies, not TYPE_CHECKING blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *module_level(other))
            continue
        yield child
        yield from module_level(child)


def strings(tree: ast.Module) -> Iterator[str]:
    """Yield all string literals except docstrings and the strings below fields, which are prose."""
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def room_of(module: str, package: str) -> str:
    """Return the part of a package that a module or a name is in. It is empty for the package itself and for
    another package.
    """
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == package else ""


def arrows_up(package: str, levels: tuple[set[str], ...]) -> list[str]:
    """Return the imports, lazy ones included, from a room to a room that is not below it."""
    level_of = {room: number for number, rooms in enumerate(levels) for room in rooms}
    found = []
    for path in SOURCES:
        here = room_of(name_of(path), package)
        for module in imported_modules(ast.walk(parse(path))):
            there = room_of(module, package)
            if here in level_of and there in level_of and there != here and level_of[there] >= level_of[here]:
                found.append(f"{name_of(path)} -> {module}")
    return found


def test_every_package_and_room_is_looked_at() -> None:
    assert {path.parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 40
    for package, levels in (("specdec", LEVELS), ("gateway", GATEWAY_LEVELS)):
        rooms = {room_of(name_of(path), package) for path in SOURCES} - {"", "__main__"}
        named = set().union(*levels) - {"v1", "__main__"}
        assert rooms == named, "a new room needs a level"


def test_services_import_themselves_and_specdec() -> None:
    for path in SOURCES:
        ours = {module.partition(".")[0] for module in imported_modules(ast.walk(parse(path)))} & set(
            PACKAGES
        )
        assert ours <= {path.parts[0], "specdec"}, f"{path} imports {ours}"


def test_rooms_import_what_is_below_them() -> None:
    assert arrows_up("specdec", LEVELS) == []
    assert arrows_up("gateway", GATEWAY_LEVELS) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {name_of(path) for path in SOURCES}

    def modules(path: Path) -> set[str]:
        named = imported_modules(ast.walk(parse(path)))
        return {m if m in names else m.rpartition(".")[0] for m in named} & names - {name_of(path)}

    imports = {name_of(path): modules(path) for path in SOURCES if path.name != "__init__.py"}
    while leaves := {name for name, others in imports.items() if not others & set(imports)}:
        for leaf in leaves:
            del imports[leaf]
    assert not imports, "these import each other, or what does"


def test_specdec_names_no_service_not_even_in_a_string() -> None:
    module = re.compile(r"\b(verifier_service|drafter_service)\b|^gateway(\.\w+)+(:\w+)?$")
    for path in SOURCES:
        if path.parts[0] == "specdec":
            assert not [text for text in strings(parse(path)) if module.search(text)], path


def test_the_round_loop_knows_neither_grpc_nor_protobuf() -> None:
    for path in SOURCES:
        if path.parts[:2] == ("gateway", "rounds"):
            imported = imported_modules(ast.walk(parse(path)))
            foreign = [
                m for m in imported if m.startswith(("grpc", "google", "specdec.v1", "specdec.transport"))
            ]
            assert not foreign, f"{path} imports {foreign}"


def test_torch_is_imported_only_where_models_run() -> None:
    for path in SOURCES:
        everywhere = imported_modules(ast.walk(parse(path)))
        at_import = imported_modules(module_level(parse(path)))
        if path.parts[0] == "gateway":
            assert not {module.partition(".")[0] for module in everywhere} & HEAVY, path
        elif path.parts[0] == "specdec" and not name_of(path).startswith(tuple(TORCH_ROOMS)):
            assert not {module.partition(".")[0] for module in at_import} & HEAVY, path


def test_the_rules_see_what_they_must() -> None:
    source = ast.parse(
        "import torch.nn\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import numpy\n"
        "try:\n    from transformers import x\nexcept ImportError:\n    pass\n"
        "class A:\n    import json\n"
        "def f():\n    'prose'\n    import gateway.cli\n    return 'gateway.cli:main'\n"
    )
    top = {"torch.nn", "typing.TYPE_CHECKING", "transformers.x", "json"}
    assert imported_modules(module_level(source)) == top
    assert imported_modules(ast.walk(source)) == {*top, "numpy", "gateway.cli"}
    assert list(strings(source)) == ["gateway.cli:main"]
    assert room_of("specdec.client.aio.AsyncClient", "specdec") == "client"
    assert room_of("gateway.cli", "specdec") == ""


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
        f"import sys, {', '.join(modules)}, specdec.client, specdec.cli.main, specdec.service.process\n"
        "heavy = {'torch', 'transformers', 'numpy', 'verifier_service', 'drafter_service'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_spans_need_the_interface_of_telemetry_alone() -> None:
    run(
        "import sys, gateway.rounds.tracing, specdec.service.telemetry\n"
        "names = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "loaded = [module for module in sys.modules if module.startswith(names)]\n"
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
        "import gateway.server, gateway.cli, specdec.client, specdec.cli.main, specdec.local.launcher\n"
        "from gateway.config import GatewayConfig\n"
        "from specdec.service.exporters import make_telemetry\n"
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


@pytest.mark.parametrize("service", ["drafter_service.server", "drafter_service.families"])
def test_drafters_without_a_model_load_no_torch(service: str) -> None:
    run(
        f"import sys, {service}\n"
        "from drafter_service.config import DrafterConfig\n"
        "from drafter_service.families import load_drafters\n"
        "names = ('ngram', 'ngram-lm')\n"
        "assert tuple(load_drafters(DrafterConfig(drafter=names))) == names\n"
        "assert 'torch' not in sys.modules"
    )

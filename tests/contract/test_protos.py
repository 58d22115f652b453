"""The contract: generated code fits the .proto files, every name is explained, every RPC is implemented."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from drafter_service.service import DrafterServicer
from gateway.service import GatewayServicer
from specdec.v1 import (
    common_pb2,
    drafter_pb2,
    drafter_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    target_state_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)
from verifier_service.service import VerifierServicer

REPOSITORY = Path(__file__).resolve().parents[2]
PROTOS = sorted((REPOSITORY / "protos").rglob("*.proto"))
MODULES: tuple[Any, ...] = (common_pb2, drafter_pb2, gateway_pb2, target_state_pb2, verifier_pb2)
GENERATED_BASES: dict[str, tuple[type, type]] = {
    "VerifierService": (verifier_pb2_grpc.VerifierServiceServicer, VerifierServicer),
    "DrafterService": (drafter_pb2_grpc.DrafterServiceServicer, DrafterServicer),
    "GatewayService": (gateway_pb2_grpc.GatewayServiceServicer, GatewayServicer),
}


def protoc(*options: str) -> None:
    names = [str(path.relative_to(REPOSITORY / "protos")) for path in PROTOS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *options, *names]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_stubs_are_what_protoc_generates(tmp_path: Path) -> None:
    protoc(*(f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")))
    generated = {path.name: path.read_bytes() for path in (tmp_path / "specdec" / "v1").iterdir()}
    committed = {
        path.name: path.read_bytes()
        for path in (REPOSITORY / "specdec" / "v1").glob("*_pb2*")
        if path.is_file()
    }
    assert len(generated) == 3 * len(PROTOS)
    assert generated.keys() == committed.keys()
    drifted = sorted(name for name, content in generated.items() if committed[name] != content)
    assert not drifted, "generate the stubs again"


def test_buf_lint_passes() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert buf, "buf is not installed beside Python; install the dev extra"
    result = subprocess.run(
        [buf, "lint", "protos"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "STANDARD" in (REPOSITORY / "protos" / "buf.yaml").read_text()


def undocumented(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Return the messages, fields, enums, values, services and RPCs of a file that have no comment before
    them.
    """
    comments = {
        tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location
    }

    def walk(path: tuple[int, ...], name: str, children: dict[int, Any]) -> list[str]:
        missing = [] if comments.get(path) else [name]
        for number, elements in children.items():
            for index, element in enumerate(elements):
                missing += walk((*path, number, index), f"{name}.{element.name}", kinds(element))
        return missing

    def kinds(element: Any) -> dict[int, Any]:
        if isinstance(element, descriptor_pb2.DescriptorProto):
            nested = [nested for nested in element.nested_type if not nested.options.map_entry]
            return {2: element.field, 3: nested, 4: element.enum_type}
        if isinstance(element, descriptor_pb2.EnumDescriptorProto):
            return {2: element.value}
        if isinstance(element, descriptor_pb2.ServiceDescriptorProto):
            return {2: element.method}
        return {}

    top = {4: file.message_type, 5: file.enum_type, 6: file.service}
    return [
        name
        for number, elements in top.items()
        for index, element in enumerate(elements)
        for name in walk((number, index), element.name, kinds(element))
    ]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorSet:
    target = tmp_path_factory.mktemp("protos") / "descriptors"
    protoc("--include_source_info", f"--descriptor_set_out={target}")
    return descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())


def test_everything_in_the_protos_is_explained(described: descriptor_pb2.FileDescriptorSet) -> None:
    assert len(described.file) == len(PROTOS)
    assert not {file.name: names for file in described.file if (names := undocumented(file))}


def test_a_missing_comment_is_found(described: descriptor_pb2.FileDescriptorSet) -> None:
    file = descriptor_pb2.FileDescriptorProto()
    file.CopyFrom(next(file for file in described.file if file.name.endswith("verifier.proto")))
    method = [method.name for method in file.service[0].method].index("StreamTargetState")
    for location in file.source_code_info.location:
        if list(location.path) in ([4, 0, 2, 0], [6, 0, 2, method]):
            location.leading_comments = ""
    assert undocumented(file) == ["VerifyRequest.open", "VerifierService.StreamTargetState"]


def test_the_package_is_versioned_and_enums_start_unspecified(
    described: descriptor_pb2.FileDescriptorSet,
) -> None:
    assert {file.package for file in described.file} == {"specdec.v1"}
    enums = [enum for file in described.file for enum in file.enum_type]
    assert enums
    for enum in enums:
        assert enum.value[0].number == 0
        assert enum.value[0].name.endswith("_UNSPECIFIED")


def test_every_rpc_has_messages_of_its_own(described: descriptor_pb2.FileDescriptorSet) -> None:
    methods = [method for file in described.file for service in file.service for method in service.method]
    types = [name for method in methods for name in (method.input_type, method.output_type)]
    assert len(types) == len(set(types))
    for method in methods:
        assert method.input_type.endswith(f"{method.name}Request")
        assert method.output_type.endswith(f"{method.name}Response")


def services() -> dict[str, Any]:
    return {
        name: service for module in MODULES for name, service in module.DESCRIPTOR.services_by_name.items()
    }


def test_every_service_has_a_servicer() -> None:
    assert services().keys() == GENERATED_BASES.keys()


@pytest.mark.parametrize("name", GENERATED_BASES)
def test_every_rpc_is_implemented(name: str) -> None:
    base, servicer = GENERATED_BASES[name]
    assert issubclass(servicer, base)
    methods = services()[name].methods
    assert methods
    for method in methods:
        implementation = getattr(servicer, method.name)
        assert implementation is not getattr(base, method.name), f"{name}.{method.name} is not implemented"
        assert inspect.iscoroutinefunction(implementation)
        assert re.search(r"\w", implementation.__doc__ or "")


class TestBreakingChanges:
    """A change that peers of the last release would misunderstand does not pass `make lint`."""

    def breaking(self, folder: Path) -> subprocess.CompletedProcess[str]:
        released = REPOSITORY / "protos" / "released.binpb"
        command = [Path(sys.executable).with_name("buf"), "breaking", folder, "--against", released]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_what_is_committed_breaks_nothing(self) -> None:
        result = self.breaking(REPOSITORY / "protos")
        assert (result.returncode, result.stdout) == (0, "")

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("uint32 draft_depth = 3;", "uint32 depth = 3;"),
            ("uint32 draft_depth = 3;", "uint32 draft_depth = 33;"),
            ("uint32 draft_depth = 3;", "string draft_depth = 3;"),
            ("rpc GetInfo(", "rpc Describe("),
        ],
    )
    def test_a_break_is_seen(self, before: str, after: str, tmp_path: Path) -> None:
        shutil.copytree(REPOSITORY / "protos", tmp_path / "protos")
        drafter = tmp_path / "protos" / "specdec" / "v1" / "drafter.proto"
        assert before in drafter.read_text()
        drafter.write_text(drafter.read_text().replace(before, after))
        result = self.breaking(tmp_path / "protos")
        assert result.returncode != 0
        assert "drafter.proto" in result.stdout

"""What `from specdec import ...` gives: all of it, typed, and nothing loaded before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

import specdec
import specdec.client
import specdec.errors
from specdec.client.gateway_info import (
    DrafterInfo,
    DrafterServiceInfo,
    GatewayInfo,
    ModelInfo,
    ReplicaInfo,
    StateLinkInfo,
    VerifierInfo,
)
from specdec.client.generation import (
    GenerateOptions,
    Generation,
    ProposerStats,
    Speculation,
    Started,
    Timing,
    Token,
    Usage,
)
from specdec.contract.load import Load
from specdec.contract.sampling import SamplingParams
from specdec.v1 import common_pb2, drafter_pb2, gateway_pb2, verifier_pb2

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_name_is_there() -> None:
    for name in specdec.__all__:
        assert getattr(specdec, name) is not None
    assert set(specdec.__all__) <= set(dir(specdec))
    assert specdec.Client is specdec.client.Client
    assert specdec.SpecdecError is specdec.errors.SpecdecError
    assert specdec.errors is sys.modules["specdec.errors"]


def test_type_checkers_see_the_same_names() -> None:
    module = ast.parse(Path(specdec.__file__).read_text())
    block = next(node for node in module.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    seen |= {node.target.id for node in block.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert seen == set(specdec.__all__)


def test_nothing_is_loaded_before_it_is_used() -> None:
    script = (
        "import sys, specdec\n"
        "assert not {'grpc', 'google.protobuf', 'specdec.client'} & set(sys.modules)\n"
        "specdec.Client\n"
        "assert 'grpc' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Clinet"):
        _ = specdec.Clinet  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from specdec import Clinet  # noqa: F401


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert specdec.__version__ == project["version"]


def test_a_users_type_checker_knows_what_things_are(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from specdec import AsyncClient, Client, errors\n"
        "from specdec.testing import MockTransport\n"
        "client = Client(transport=MockTransport('Hi'))\n"
        "AsyncClient(transport=MockTransport(lambda request: request.text))\n"
        "text: str = client.generate([{'role': 'user', 'content': 'Hi'}], temperature=0.5, stop='END').text\n"
        "error: type[Exception] = errors.UnavailableError\n"
        "client.generate('Hi', temprature=0.5)\n"
        "client.generate('Hi', temperature='hot')\n"
        "from specdec import Clinet\n"
    )
    command = [sys.executable, "-m", "mypy", str(program)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    wrong = [line.split(":")[1] for line in result.stdout.splitlines() if ": error:" in line]
    assert wrong == ["7", "8", "9"], result.stdout


RENAMED = {"stop_strings": "stop", "target_state_spec": "reads_target_state", "logprobs": "logprob"}
"""Fields of messages that have another name in a dataclass."""


@pytest.mark.parametrize(
    ("kind", "message", "left_out"),
    [
        (GenerateOptions, gateway_pb2.GenerateRequest, {"chat", "text", "token_ids"}),
        (SamplingParams, common_pb2.SamplingParams, set()),
        (Started, gateway_pb2.GenerateStarted, set()),
        (Token, gateway_pb2.Token, {"origin"}),
        (Generation, gateway_pb2.GenerateFinished, set()),
        (Usage, gateway_pb2.Usage, set()),
        (Timing, gateway_pb2.GenerateTiming, set()),
        (Speculation, gateway_pb2.SpeculationStats, set()),
        (ProposerStats, gateway_pb2.ProposerStats, set()),
        (GatewayInfo, gateway_pb2.GatewayServiceGetInfoResponse, set()),
        (ReplicaInfo, gateway_pb2.ReplicaInfo, {"verifier", "drafter"}),
        (ModelInfo, common_pb2.ModelInfo, set()),
        (VerifierInfo, verifier_pb2.VerifierServiceGetInfoResponse, set()),
        (DrafterServiceInfo, drafter_pb2.DrafterServiceGetInfoResponse, set()),
        (DrafterInfo, drafter_pb2.DrafterInfo, set()),
        (StateLinkInfo, drafter_pb2.StateLink, set()),
        (Load, common_pb2.Load, set()),
    ],
)
def test_what_is_on_the_wire_reaches_the_user(kind: Any, message: type[Message], left_out: set[str]) -> None:
    names = {RENAMED.get(name, name) for name in message.DESCRIPTOR.fields_by_name}
    in_milliseconds = {f"{name.removesuffix('_ns')}_ms" if name.endswith("_ns") else name for name in names}
    assert in_milliseconds - {field.name for field in fields(kind)} == left_out

"""Speculative decoding as services: a drafter guesses, the target verifies, the text is the target's own.

    from specdec import Client

    with Client("127.0.0.1:50050") as client:
        print(client.generate("Name three rivers.", temperature=0.8, seed=7).text)

What is named here is the public interface, with `specdec.testing` for tests without a server. It is loaded
when it is first used: `import specdec` itself loads neither gRPC nor protobuf.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec import errors
    from specdec.client import (
        AsyncClient,
        AsyncGenerationStream,
        AsyncGrpcTransport,
        AsyncTransport,
        Client,
        DrafterInfo,
        DrafterServiceInfo,
        GatewayInfo,
        GenerateOptions,
        Generation,
        GenerationStream,
        GrpcTransport,
        Message,
        ModelInfo,
        OutputFormat,
        Prompt,
        ProposerStats,
        ReplicaInfo,
        SamplingParams,
        Speculation,
        Started,
        Timing,
        TlsConfig,
        Token,
        Transport,
        Usage,
        VerifierInfo,
        find_gateway,
    )
    from specdec.errors import SpecdecError
    from specdec.local.launcher import LocalSystem

    __version__: str

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncGrpcTransport",
    "AsyncTransport",
    "Client",
    "DrafterInfo",
    "DrafterServiceInfo",
    "GatewayInfo",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "GrpcTransport",
    "LocalSystem",
    "Message",
    "ModelInfo",
    "OutputFormat",
    "Prompt",
    "ProposerStats",
    "ReplicaInfo",
    "SamplingParams",
    "SpecdecError",
    "Speculation",
    "Started",
    "Timing",
    "TlsConfig",
    "Token",
    "Transport",
    "Usage",
    "VerifierInfo",
    "__version__",
    "errors",
    "find_gateway",
]

_HOMES = {
    "LocalSystem": "specdec.local.launcher",
    "SpecdecError": "specdec.errors",
}
"""Where names are defined that are not the client's."""

if not TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "__version__":
            from importlib.metadata import version

            value: object = version(__name__)
        elif name == "errors":
            value = import_module("specdec.errors")
        else:
            value = getattr(import_module(_HOMES.get(name, "specdec.client")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

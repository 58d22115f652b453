"""The client SDK: `Client` on the blocking gRPC stack, `AsyncClient` on asyncio. Needs no torch.

    with Client("127.0.0.1:50050") as client:
        print(client.generate("Write a haiku about rivers.", temperature=0.8, seed=7).text)
        with client.stream("Count to ten.", method="ngram") as stream:
            for token in stream:
                print(token.text, end="", flush=True)
        print(stream.result.speculation.mean_acceptance_length)

Every failed call raises a `specdec.errors.SpecdecError`. The caller's trace goes on in the services. Tests of
a program that uses a client need no server: see `specdec.testing`.
"""

from specdec.client.aio import AsyncClient
from specdec.client.blocking import Client
from specdec.client.common import DEFAULT_TIMEOUT_S
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
    Message,
    MethodRounds,
    Prompt,
    ProposerStats,
    Speculation,
    Started,
    Timing,
    Token,
    Usage,
)
from specdec.client.over_grpc import (
    GATEWAY_VARIABLE,
    TOKEN_VARIABLE,
    AsyncGrpcTransport,
    GrpcTransport,
    find_gateway,
)
from specdec.client.streams import AsyncGenerationStream, GenerationStream
from specdec.client.transport import AsyncCall, AsyncTransport, Call, Metadata, Transport
from specdec.contract.load import Load
from specdec.contract.output_format import OutputFormat
from specdec.contract.sampling import SamplingParams
from specdec.transport.channel import TlsConfig

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "GATEWAY_VARIABLE",
    "TOKEN_VARIABLE",
    "AsyncCall",
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncGrpcTransport",
    "AsyncTransport",
    "Call",
    "Client",
    "DrafterInfo",
    "DrafterServiceInfo",
    "GatewayInfo",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "GrpcTransport",
    "Load",
    "Message",
    "Metadata",
    "MethodRounds",
    "ModelInfo",
    "OutputFormat",
    "Prompt",
    "ProposerStats",
    "ReplicaInfo",
    "SamplingParams",
    "Speculation",
    "Started",
    "StateLinkInfo",
    "Timing",
    "TlsConfig",
    "Token",
    "Transport",
    "Usage",
    "VerifierInfo",
    "find_gateway",
]

"""The client SDK: `Client` on the blocking gRPC stack, `AsyncClient` on asyncio. Needs no torch.

    with Client("127.0.0.1:50050") as client:
        print(client.generate("Write a haiku about rivers.").text)
        with client.stream("Count to ten.", GenerateOptions(method="ngram")) as stream:
            for token in stream:
                print(token.text, end="", flush=True)
        print(stream.result.speculation.mean_acceptance_length)

Every failed call raises a `specdec.errors.SpecdecError`. The caller's trace goes on in the services.
"""

from specdec.client.aio import AsyncClient
from specdec.client.blocking import Client
from specdec.client.common import DEFAULT_TIMEOUT_S, GATEWAY_VARIABLE, TOKEN_VARIABLE, find_gateway
from specdec.client.gateway_info import (
    DrafterInfo,
    DrafterServiceInfo,
    GatewayInfo,
    ModelInfo,
    ReplicaInfo,
    VerifierInfo,
)
from specdec.client.generation import (
    GenerateOptions,
    Generation,
    Message,
    Prompt,
    ProposerStats,
    Speculation,
    Started,
    Timing,
    Token,
    Usage,
)
from specdec.client.streams import AsyncGenerationStream, GenerationStream
from specdec.contract.sampling import SamplingParams
from specdec.transport.channel import TlsConfig

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "GATEWAY_VARIABLE",
    "TOKEN_VARIABLE",
    "AsyncClient",
    "AsyncGenerationStream",
    "Client",
    "DrafterInfo",
    "DrafterServiceInfo",
    "GatewayInfo",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "Message",
    "ModelInfo",
    "Prompt",
    "ProposerStats",
    "ReplicaInfo",
    "SamplingParams",
    "Speculation",
    "Started",
    "Timing",
    "TlsConfig",
    "Token",
    "Usage",
    "VerifierInfo",
    "find_gateway",
]

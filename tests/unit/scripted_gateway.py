"""A gateway on a real server that answers from a script."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError, to_status
from specdec.contract.protocol import PROTOCOL_VERSION
from specdec.transport.server import server_options
from specdec.v1 import common_pb2, drafter_pb2, gateway_pb2, gateway_pb2_grpc, verifier_pb2

Responses = Iterator[gateway_pb2.GenerateResponse]
Script = Callable[["ScriptedGateway", gateway_pb2.GenerateRequest, grpc.ServicerContext], Responses]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def token(
    token_id: int, text: str, *, draft: bool = False, logprob: float | None = None
) -> gateway_pb2.Token:
    """Return a token as it is on the wire."""
    origin = gateway_pb2.TOKEN_ORIGIN_ACCEPTED_DRAFT if draft else gateway_pb2.TOKEN_ORIGIN_BONUS
    message = gateway_pb2.Token(token_id=token_id, text=text, origin=origin)
    if logprob is not None:
        message.logprobs.logprob = logprob
        message.logprobs.top.add(token_id=token_id, logprob=logprob)
        message.logprobs.top.add(token_id=token_id + 1, logprob=logprob - 1)
    return message


def started(method: str = "ngram", seed: int | None = None) -> gateway_pb2.GenerateResponse:
    """Return the first response."""
    return gateway_pb2.GenerateResponse(
        started=gateway_pb2.GenerateStarted(
            input_tokens=5,
            method=method,
            draft_depth=4,
            trace_id=TRACE_ID,
            model_id="tiny",
            request_id="request-1",
            seed=seed,
        )
    )


def chunk(*tokens: gateway_pb2.Token) -> gateway_pb2.GenerateResponse:
    """Return the response of a round."""
    return gateway_pb2.GenerateResponse(chunk=gateway_pb2.GenerateChunk(tokens=tokens))


def finished(method: str = "ngram", *, fallback_reason: str = "") -> gateway_pb2.GenerateResponse:
    """Return the last response: two rounds, three of five draft tokens accepted."""
    return gateway_pb2.GenerateResponse(
        finished=gateway_pb2.GenerateFinished(
            finish_reason=verifier_pb2.FINISH_REASON_STOP_TOKEN,
            usage=gateway_pb2.Usage(input_tokens=5, output_tokens=5),
            timing=gateway_pb2.GenerateTiming(ttft_ns=2_000_000, tpot_ns=500_000, total_ns=4_000_000),
            speculation=gateway_pb2.SpeculationStats(
                method=method,
                num_rounds=2,
                num_draft_tokens=5,
                num_accepted_tokens=3,
                acceptance_histogram=[0, 1, 1],
                num_draft_tokens_per_position=[2, 2, 1],
                num_accepted_tokens_per_position=[2, 1, 0],
                draft_ns=100_000,
                verify_ns=1_500_000,
                transport_ns=300_000,
                gateway_ns=50_000,
                num_fallback_rounds=1 if fallback_reason else 0,
                fallback_reason=fallback_reason,
            ),
        )
    )


def answer(_gateway: object, request: gateway_pb2.GenerateRequest, _context: object) -> Responses:
    """Yield the usual script: "Hello, world!" in three chunks."""
    method = request.method or "ngram"
    logprob = -0.5 if request.HasField("num_top_logprobs") else None
    yield started(method, 7 if request.sampling.temperature else None)
    yield chunk(token(11, "Hello", logprob=logprob))
    yield chunk(token(12, ",", draft=True, logprob=logprob), token(13, " world", logprob=logprob))
    yield chunk(token(14, "!", draft=True, logprob=logprob), token(2, "", logprob=logprob))
    yield finished(method)


def hang(gateway: ScriptedGateway, _request: object, context: grpc.ServicerContext) -> Responses:
    """Yield two tokens, then nothing until the client goes away."""
    context.add_callback(gateway.ended.set)
    yield started()
    yield chunk(token(11, "Hel"), token(12, "lo"))
    gateway.ended.wait(30)


def refuse(_gateway: object, _request: object, context: grpc.ServicerContext) -> Responses:
    """Refuse the request because no slot is free."""
    error = ResourceExhaustedError("No slot is free.", reason="NO_SLOT", retry_after_s=1.5)
    context.abort_with_status(to_status(error))
    yield started()


def refuse_as_too_long(_gateway: object, _request: object, context: grpc.ServicerContext) -> Responses:
    """Refuse the request because its prompt fills the context."""
    error = InvalidArgumentError("The prompt has 99 tokens.", field="prompt", reason="PROMPT_TOO_LONG")
    context.abort_with_status(to_status(error))
    yield started()


def information() -> gateway_pb2.GatewayServiceGetInfoResponse:
    """Return what GetInfo answers."""
    model = common_pb2.ModelInfo(
        model_id="tiny",
        vocabulary_fingerprint="ab" * 32,
        vocab_size=100,
        max_length=64,
        dtype="bfloat16",
        revision="0123abcd" * 5,
    )
    verifier = verifier_pb2.VerifierServiceGetInfoResponse(
        protocol_version=PROTOCOL_VERSION,
        model=model,
        max_draft_nodes=15,
        kv_capacity_tokens=1000,
        kv_free_tokens=900,
        max_sessions=8,
        num_sessions=1,
        eos_token_ids=[2],
    )
    ngram = drafter_pb2.DrafterInfo(name="ngram", family="ngram", max_draft_depth=15, default_draft_depth=4)
    drafter = drafter_pb2.DrafterServiceGetInfoResponse(drafters=[ngram], max_sessions=9, num_sessions=2)
    return gateway_pb2.GatewayServiceGetInfoResponse(
        protocol_version=PROTOCOL_VERSION,
        model=model,
        methods=["none", "ngram"],
        default_method="ngram",
        default_max_new_tokens=128,
        verifiers=[gateway_pb2.ReplicaInfo(uri="host:1", ready=True, num_sessions=1, verifier=verifier)],
        drafters=[
            gateway_pb2.ReplicaInfo(uri="host:2", ready=True, drafter=drafter),
            gateway_pb2.ReplicaInfo(uri="host:3", reason="connection refused"),
        ],
    )


@dataclass
class ScriptedGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Runs `script` for every request and remembers the requests."""

    script: Script = answer
    requests: list[gateway_pb2.GenerateRequest] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    address: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of the last call."""
    time_remaining_s: float = 0.0
    """Until the last call's deadline, when it came; years if it has none."""

    def Generate(self, request: gateway_pb2.GenerateRequest, context: grpc.ServicerContext) -> Responses:  # noqa: N802
        """Answer as the contract says."""
        self.requests.append(request)
        self._note(context)
        yield from self.script(self, request, context)

    def GetInfo(  # noqa: N802
        self, request: object, context: grpc.ServicerContext
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Answer as the contract says."""
        self._note(context)
        return information()

    def _note(self, context: grpc.ServicerContext) -> None:
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.time_remaining_s = context.time_remaining()


@contextmanager
def serving(credentials: grpc.ServerCredentials | None = None) -> Iterator[ScriptedGateway]:
    """Run a scripted gateway on a free port, over TLS if it has credentials."""
    gateway = ScriptedGateway()
    server = grpc.server(ThreadPoolExecutor(4), options=server_options())
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    if credentials:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    gateway.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield gateway
    finally:
        gateway.ended.set()
        server.stop(0).wait()

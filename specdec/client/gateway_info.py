"""What a gateway says about the system behind it, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.contract.target_state import STORAGE_TO_PROTO
from specdec.v1 import common_pb2, drafter_pb2, gateway_pb2, target_state_pb2, verifier_pb2


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model."""

    model_id: str
    """The model as the server was told to load it."""
    vocabulary_fingerprint: str
    """SHA-256 over the vocabulary; equal fingerprints may exchange token ids."""
    vocab_size: int
    """Rows of the LM head; 0: no vocabulary."""
    max_length: int
    """Longest sequence, tokens, prompt included; 0: no limit."""
    dtype: str
    """Weight data type; empty: no weights."""
    device: str
    """Device of the weights; empty: no weights."""


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """A loaded drafter."""

    name: str
    """What a request names as its method."""
    family: str
    """Kind of drafter, "ngram" for one."""
    model: ModelInfo | None
    """The draft model; None: the drafter has none."""
    max_draft_depth: int
    """Most tokens drafted in a row."""
    default_draft_depth: int
    """Tokens drafted in a row when a request does not say."""
    reads_target_state: bool
    """Whether it reads hidden states or KV of the target."""
    max_draft_nodes: int = 0
    """Most tokens of a draft tree; 0: it drafts chains only."""


@dataclass(frozen=True, slots=True)
class VerifierInfo:
    """A verifier and its load."""

    model: ModelInfo | None
    """The target model."""
    max_draft_nodes: int
    """Most draft tokens taken in one round, all branches of a tree together."""
    kv_capacity_tokens: int
    """Tokens the KV pool holds."""
    kv_free_tokens: int
    """Tokens of the KV pool no session has reserved."""
    max_sessions: int
    """Most sessions at a time."""
    num_sessions: int
    """Sessions now, of all gateways."""
    eos_token_ids: tuple[int, ...]
    """The model's own end tokens."""
    state_storage: str
    """How a drafter on the same host or GPU gets at target state: "shared_memory", "cuda_ipc" or "stream"."""
    num_state_sessions: int
    """Sessions that export target state."""
    num_state_streams: int
    """Streams of target state."""


@dataclass(frozen=True, slots=True)
class StateLinkInfo:
    """How sessions of a drafter service read one verifier's target state."""

    verifier_uri: str
    """Where the verifier says it can be reached."""
    storage: str
    """"shared_memory", "cuda_ipc" or "stream"."""
    num_sessions: int
    """Sessions that read it so."""
    fallback_reason: str
    """Why it is streamed though a handle was offered; empty: none was, or it is not streamed."""


@dataclass(frozen=True, slots=True)
class DrafterServiceInfo:
    """A drafter service and its load."""

    drafters: tuple[DrafterInfo, ...]
    """The loaded drafters."""
    max_sessions: int
    """Most sessions at a time, all drafters together."""
    num_sessions: int
    """Sessions now, of all gateways."""
    state_links: tuple[StateLinkInfo, ...]
    """Where sessions read target state now."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One address behind the gateway."""

    uri: str
    """gRPC URI."""
    ready: bool
    """Whether requests can be sent there."""
    num_sessions: int
    """Requests this gateway has on it now."""
    reason: str
    """Why it is not ready; empty: it is."""
    info: VerifierInfo | DrafterServiceInfo | None
    """What it is; None: it has never been ready."""


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """The system as the gateway sees it."""

    protocol_version: int
    """Protocol version the gateway speaks."""
    model: ModelInfo | None
    """The target model; None: no verifier has been ready yet."""
    methods: tuple[str, ...]
    """Methods a request may name."""
    default_method: str
    """Method of a request that names none."""
    default_max_new_tokens: int
    """Limit of a request that names none."""
    verifiers: tuple[ReplicaInfo, ...]
    """Verifier replicas."""
    drafters: tuple[ReplicaInfo, ...]
    """Drafter replicas."""

    @classmethod
    def from_proto(cls, message: gateway_pb2.GatewayServiceGetInfoResponse) -> GatewayInfo:
        """The dataclasses of a GetInfo response."""
        return cls(
            protocol_version=message.protocol_version,
            model=_model(message.model) if message.HasField("model") else None,
            methods=tuple(message.methods),
            default_method=message.default_method,
            default_max_new_tokens=message.default_max_new_tokens,
            verifiers=tuple(_replica(replica) for replica in message.verifiers),
            drafters=tuple(_replica(replica) for replica in message.drafters),
        )


def _model(message: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        model_id=message.model_id,
        vocabulary_fingerprint=message.vocabulary_fingerprint,
        vocab_size=message.vocab_size,
        max_length=message.max_length,
        dtype=message.dtype,
        device=message.device,
    )


def _replica(message: gateway_pb2.ReplicaInfo) -> ReplicaInfo:
    info: VerifierInfo | DrafterServiceInfo | None = None
    match message.WhichOneof("info"):
        case "verifier":
            info = _verifier(message.verifier)
        case "drafter":
            info = _drafter_service(message.drafter)
    return ReplicaInfo(message.uri, message.ready, message.num_sessions, message.reason, info)


def _verifier(message: verifier_pb2.VerifierServiceGetInfoResponse) -> VerifierInfo:
    return VerifierInfo(
        model=_model(message.model) if message.HasField("model") else None,
        max_draft_nodes=message.max_draft_nodes,
        kv_capacity_tokens=message.kv_capacity_tokens,
        kv_free_tokens=message.kv_free_tokens,
        max_sessions=message.max_sessions,
        num_sessions=message.num_sessions,
        eos_token_ids=tuple(message.eos_token_ids),
        state_storage=_storage(message.state_storage),
        num_state_sessions=message.num_state_sessions,
        num_state_streams=message.num_state_streams,
    )


def _drafter_service(message: drafter_pb2.DrafterServiceGetInfoResponse) -> DrafterServiceInfo:
    drafters = tuple(
        DrafterInfo(
            name=drafter.name,
            family=drafter.family,
            model=_model(drafter.model) if drafter.model.model_id else None,
            max_draft_depth=drafter.max_draft_depth,
            default_draft_depth=drafter.default_draft_depth,
            reads_target_state=drafter.HasField("target_state_spec"),
            max_draft_nodes=drafter.max_draft_nodes,
        )
        for drafter in message.drafters
    )
    links = tuple(
        StateLinkInfo(
            verifier_uri=link.verifier_uri,
            storage=_storage(link.storage),
            num_sessions=link.num_sessions,
            fallback_reason=link.fallback_reason,
        )
        for link in message.state_links
    )
    return DrafterServiceInfo(drafters, message.max_sessions, message.num_sessions, links)


def _storage(number: target_state_pb2.StateStorage) -> str:
    """Name of a storage; empty: not known."""
    return next((kind.value for kind, known in STORAGE_TO_PROTO.items() if known == number), "")

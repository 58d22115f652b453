"""What a gateway says about the system behind it, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.client.wire import from_message
from specdec.contract.load import Load
from specdec.contract.target_state import STORAGE_TO_PROTO
from specdec.v1 import drafter_pb2, gateway_pb2, target_state_pb2, verifier_pb2


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
    revision: str = ""
    """Which weights these are: the hub's commit, or a digest of the files; empty: not known."""
    model_impl: str = ""
    """Whose code computes a pass: "specdec", or "transformers", which is slower; empty: no decoder layers."""


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """A loaded drafter."""

    name: str
    """What a request names as its method."""
    family: str
    """Kind of drafter, such as "ngram"."""
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
    protocol_version: int = 0
    """Newest protocol version it speaks."""
    min_protocol_version: int = 0
    """Oldest protocol version it speaks; 0: `protocol_version` alone."""
    load: Load = field(default_factory=Load)
    """How busy it is, as the gateway compares replicas; all zeros: it does not say."""
    takes_output_formats: bool = False
    """Whether answers may have an output format."""


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
    protocol_version: int = 0
    """Newest protocol version it speaks."""
    min_protocol_version: int = 0
    """Oldest protocol version it speaks; 0: `protocol_version` alone."""
    load: Load = field(default_factory=Load)
    """How busy it is, as the gateway compares replicas; all zeros: it does not say."""


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
    """Newest protocol version the gateway speaks."""
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

    min_protocol_version: int = 0
    """Oldest protocol version the gateway speaks; 0: `protocol_version` alone."""

    @classmethod
    def from_proto(cls, message: gateway_pb2.GatewayServiceGetInfoResponse) -> GatewayInfo:
        """Return the dataclasses of a GetInfo response."""
        return from_message(
            cls,
            message,
            model=_model(message),
            verifiers=tuple(_replica(replica) for replica in message.verifiers),
            drafters=tuple(_replica(replica) for replica in message.drafters),
        )


def _model(
    owner: gateway_pb2.GatewayServiceGetInfoResponse
    | verifier_pb2.VerifierServiceGetInfoResponse
    | drafter_pb2.DrafterInfo,
) -> ModelInfo | None:
    return from_message(ModelInfo, owner.model) if owner.HasField("model") else None


def _replica(message: gateway_pb2.ReplicaInfo) -> ReplicaInfo:
    info: VerifierInfo | DrafterServiceInfo | None = None
    match message.WhichOneof("info"):
        case "verifier":
            info = _verifier(message.verifier)
        case "drafter":
            info = _drafter_service(message.drafter)
    return from_message(ReplicaInfo, message, info=info)


def _verifier(message: verifier_pb2.VerifierServiceGetInfoResponse) -> VerifierInfo:
    storage = _storage(message.state_storage)
    load = Load.from_proto(message.load)
    return from_message(VerifierInfo, message, model=_model(message), state_storage=storage, load=load)


def _drafter_service(message: drafter_pb2.DrafterServiceGetInfoResponse) -> DrafterServiceInfo:
    drafters = tuple(
        from_message(
            DrafterInfo,
            drafter,
            # A drafter without a model has one without a name, which says what vocabulary it works with.
            model=_model(drafter) if drafter.model.model_id else None,
            reads_target_state=drafter.HasField("target_state_spec"),
        )
        for drafter in message.drafters
    )
    links = tuple(
        from_message(StateLinkInfo, link, storage=_storage(link.storage)) for link in message.state_links
    )
    load = Load.from_proto(message.load)
    return from_message(DrafterServiceInfo, message, drafters=drafters, state_links=links, load=load)


def _storage(number: target_state_pb2.StateStorage) -> str:
    """Name of a storage; empty: not known."""
    return next((kind.value for kind, known in STORAGE_TO_PROTO.items() if known == number), "")

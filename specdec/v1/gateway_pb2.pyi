from specdec.v1 import common_pb2 as _common_pb2
from specdec.v1 import drafter_pb2 as _drafter_pb2
from specdec.v1 import verifier_pb2 as _verifier_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenOrigin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_ORIGIN_UNSPECIFIED: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_ACCEPTED_DRAFT: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_BONUS: _ClassVar[TokenOrigin]
TOKEN_ORIGIN_UNSPECIFIED: TokenOrigin
TOKEN_ORIGIN_ACCEPTED_DRAFT: TokenOrigin
TOKEN_ORIGIN_BONUS: TokenOrigin

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("chat", "text", "token_ids", "sampling", "max_new_tokens", "stop_token_ids", "stop_strings", "ignore_eos", "method", "draft_depth", "num_top_logprobs", "min_draft_confidence", "draft_nodes", "cache_salt", "output_format")
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DRAFT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_DRAFT_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NODES_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    chat: Chat
    text: str
    token_ids: TokenIds
    sampling: _common_pb2.SamplingParams
    max_new_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    method: str
    draft_depth: int
    num_top_logprobs: int
    min_draft_confidence: float
    draft_nodes: int
    cache_salt: str
    output_format: _common_pb2.OutputFormat
    def __init__(self, chat: _Optional[_Union[Chat, _Mapping]] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., stop_strings: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., method: _Optional[str] = ..., draft_depth: _Optional[int] = ..., num_top_logprobs: _Optional[int] = ..., min_draft_confidence: _Optional[float] = ..., draft_nodes: _Optional[int] = ..., cache_salt: _Optional[str] = ..., output_format: _Optional[_Union[_common_pb2.OutputFormat, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "chunk", "finished", "padding")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    started: GenerateStarted
    chunk: GenerateChunk
    finished: GenerateFinished
    padding: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, started: _Optional[_Union[GenerateStarted, _Mapping]] = ..., chunk: _Optional[_Union[GenerateChunk, _Mapping]] = ..., finished: _Optional[_Union[GenerateFinished, _Mapping]] = ..., padding: _Optional[_Iterable[bytes]] = ...) -> None: ...

class GenerateStarted(_message.Message):
    __slots__ = ("input_tokens", "method", "draft_depth", "trace_id", "model_id", "draft_nodes", "request_id", "seed")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DRAFT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NODES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    method: str
    draft_depth: int
    trace_id: str
    model_id: str
    draft_nodes: int
    request_id: str
    seed: int
    def __init__(self, input_tokens: _Optional[int] = ..., method: _Optional[str] = ..., draft_depth: _Optional[int] = ..., trace_id: _Optional[str] = ..., model_id: _Optional[str] = ..., draft_nodes: _Optional[int] = ..., request_id: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "text", "origin", "logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    origin: TokenOrigin
    logprobs: _common_pb2.TokenLogprobs
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., origin: _Optional[_Union[TokenOrigin, str]] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class GenerateChunk(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("input_tokens", "output_tokens", "reused_input_tokens")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    output_tokens: int
    reused_input_tokens: int
    def __init__(self, input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., reused_input_tokens: _Optional[int] = ...) -> None: ...

class GenerateTiming(_message.Message):
    __slots__ = ("ttft_ns", "tpot_ns", "total_ns", "waiting_ns")
    TTFT_NS_FIELD_NUMBER: _ClassVar[int]
    TPOT_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    WAITING_NS_FIELD_NUMBER: _ClassVar[int]
    ttft_ns: int
    tpot_ns: int
    total_ns: int
    waiting_ns: int
    def __init__(self, ttft_ns: _Optional[int] = ..., tpot_ns: _Optional[int] = ..., total_ns: _Optional[int] = ..., waiting_ns: _Optional[int] = ...) -> None: ...

class SpeculationStats(_message.Message):
    __slots__ = ("method", "num_rounds", "num_draft_tokens", "num_accepted_tokens", "acceptance_histogram", "num_draft_tokens_per_position", "num_accepted_tokens_per_position", "draft_ns", "verify_ns", "transport_ns", "gateway_ns", "num_fallback_rounds", "fallback_reason", "proposers", "methods")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_PER_POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_PER_POSITION_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_NS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_NS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_FALLBACK_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    PROPOSERS_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    method: str
    num_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_histogram: _containers.RepeatedScalarFieldContainer[int]
    num_draft_tokens_per_position: _containers.RepeatedScalarFieldContainer[int]
    num_accepted_tokens_per_position: _containers.RepeatedScalarFieldContainer[int]
    draft_ns: int
    verify_ns: int
    transport_ns: int
    gateway_ns: int
    num_fallback_rounds: int
    fallback_reason: str
    proposers: _containers.RepeatedCompositeFieldContainer[ProposerStats]
    methods: _containers.RepeatedCompositeFieldContainer[MethodRounds]
    def __init__(self, method: _Optional[str] = ..., num_rounds: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., acceptance_histogram: _Optional[_Iterable[int]] = ..., num_draft_tokens_per_position: _Optional[_Iterable[int]] = ..., num_accepted_tokens_per_position: _Optional[_Iterable[int]] = ..., draft_ns: _Optional[int] = ..., verify_ns: _Optional[int] = ..., transport_ns: _Optional[int] = ..., gateway_ns: _Optional[int] = ..., num_fallback_rounds: _Optional[int] = ..., fallback_reason: _Optional[str] = ..., proposers: _Optional[_Iterable[_Union[ProposerStats, _Mapping]]] = ..., methods: _Optional[_Iterable[_Union[MethodRounds, _Mapping]]] = ...) -> None: ...

class MethodRounds(_message.Message):
    __slots__ = ("method", "num_rounds")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    method: str
    num_rounds: int
    def __init__(self, method: _Optional[str] = ..., num_rounds: _Optional[int] = ...) -> None: ...

class ProposerStats(_message.Message):
    __slots__ = ("drafter", "num_draft_tokens", "num_accepted_tokens", "num_sole_accepted_tokens", "num_fallback_rounds", "fallback_reason")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SOLE_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FALLBACK_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    num_draft_tokens: int
    num_accepted_tokens: int
    num_sole_accepted_tokens: int
    num_fallback_rounds: int
    fallback_reason: str
    def __init__(self, drafter: _Optional[str] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_sole_accepted_tokens: _Optional[int] = ..., num_fallback_rounds: _Optional[int] = ..., fallback_reason: _Optional[str] = ...) -> None: ...

class GenerateFinished(_message.Message):
    __slots__ = ("finish_reason", "usage", "timing", "speculation", "num_failovers")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILOVERS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _verifier_pb2.FinishReason
    usage: Usage
    timing: GenerateTiming
    speculation: SpeculationStats
    num_failovers: int
    def __init__(self, finish_reason: _Optional[_Union[_verifier_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[GenerateTiming, _Mapping]] = ..., speculation: _Optional[_Union[SpeculationStats, _Mapping]] = ..., num_failovers: _Optional[int] = ...) -> None: ...

class GatewayServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplicaInfo(_message.Message):
    __slots__ = ("uri", "ready", "num_sessions", "reason", "verifier", "drafter")
    URI_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    uri: str
    ready: bool
    num_sessions: int
    reason: str
    verifier: _verifier_pb2.VerifierServiceGetInfoResponse
    drafter: _drafter_pb2.DrafterServiceGetInfoResponse
    def __init__(self, uri: _Optional[str] = ..., ready: _Optional[bool] = ..., num_sessions: _Optional[int] = ..., reason: _Optional[str] = ..., verifier: _Optional[_Union[_verifier_pb2.VerifierServiceGetInfoResponse, _Mapping]] = ..., drafter: _Optional[_Union[_drafter_pb2.DrafterServiceGetInfoResponse, _Mapping]] = ...) -> None: ...

class GatewayServiceGetInfoResponse(_message.Message):
    __slots__ = ("protocol_version", "model", "methods", "default_method", "default_max_new_tokens", "verifiers", "drafters", "min_protocol_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_METHOD_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERIFIERS_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    MIN_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model: _common_pb2.ModelInfo
    methods: _containers.RepeatedScalarFieldContainer[str]
    default_method: str
    default_max_new_tokens: int
    verifiers: _containers.RepeatedCompositeFieldContainer[ReplicaInfo]
    drafters: _containers.RepeatedCompositeFieldContainer[ReplicaInfo]
    min_protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ..., model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., methods: _Optional[_Iterable[str]] = ..., default_method: _Optional[str] = ..., default_max_new_tokens: _Optional[int] = ..., verifiers: _Optional[_Iterable[_Union[ReplicaInfo, _Mapping]]] = ..., drafters: _Optional[_Iterable[_Union[ReplicaInfo, _Mapping]]] = ..., min_protocol_version: _Optional[int] = ...) -> None: ...

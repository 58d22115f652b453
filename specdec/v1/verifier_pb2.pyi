from specdec.v1 import common_pb2 as _common_pb2
from specdec.v1 import target_state_pb2 as _target_state_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP_TOKEN: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP_STRING: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP_TOKEN: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP_STRING: FinishReason

class VerifyRequest(_message.Message):
    __slots__ = ("open", "round", "traceparent")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    open: VerifyOpen
    round: VerifyRound
    traceparent: str
    def __init__(self, open: _Optional[_Union[VerifyOpen, _Mapping]] = ..., round: _Optional[_Union[VerifyRound, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class VerifyManyRequest(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("session", "change", "request", "timeout_ms")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        CHANGE_FIELD_NUMBER: _ClassVar[int]
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
        session: int
        change: _common_pb2.SessionChange
        request: VerifyRequest
        timeout_ms: int
        def __init__(self, session: _Optional[int] = ..., change: _Optional[_Union[_common_pb2.SessionChange, str]] = ..., request: _Optional[_Union[VerifyRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[VerifyManyRequest.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[VerifyManyRequest.Item, _Mapping]]] = ...) -> None: ...

class VerifyManyResponse(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("session", "response", "end")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        RESPONSE_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        session: int
        response: VerifyResponse
        end: _common_pb2.SessionEnd
        def __init__(self, session: _Optional[int] = ..., response: _Optional[_Union[VerifyResponse, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.SessionEnd, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[VerifyManyResponse.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[VerifyManyResponse.Item, _Mapping]]] = ...) -> None: ...

class VerifyOpen(_message.Message):
    __slots__ = ("handshake", "committed_token_ids", "prompt_length", "sampling", "stop_token_ids", "ignore_eos", "max_new_tokens", "num_top_logprobs", "target_state_spec", "drafter_state_specs", "draft_nodes", "request_id", "caller_key", "cache_salt", "output_format")
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_STATE_SPEC_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_STATE_SPECS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NODES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CALLER_KEY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    handshake: _common_pb2.Handshake
    committed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_length: int
    sampling: _common_pb2.SamplingParams
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    max_new_tokens: int
    num_top_logprobs: int
    target_state_spec: _target_state_pb2.TargetStateSpec
    drafter_state_specs: _containers.RepeatedCompositeFieldContainer[_target_state_pb2.TargetStateSpec]
    draft_nodes: int
    request_id: str
    caller_key: str
    cache_salt: str
    output_format: _common_pb2.OutputFormat
    def __init__(self, handshake: _Optional[_Union[_common_pb2.Handshake, _Mapping]] = ..., committed_token_ids: _Optional[_Iterable[int]] = ..., prompt_length: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., max_new_tokens: _Optional[int] = ..., num_top_logprobs: _Optional[int] = ..., target_state_spec: _Optional[_Union[_target_state_pb2.TargetStateSpec, _Mapping]] = ..., drafter_state_specs: _Optional[_Iterable[_Union[_target_state_pb2.TargetStateSpec, _Mapping]]] = ..., draft_nodes: _Optional[int] = ..., request_id: _Optional[str] = ..., caller_key: _Optional[str] = ..., cache_salt: _Optional[str] = ..., output_format: _Optional[_Union[_common_pb2.OutputFormat, _Mapping]] = ...) -> None: ...

class VerifyRound(_message.Message):
    __slots__ = ("base_committed_length", "draft_token_ids", "parent_indices")
    BASE_COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENT_INDICES_FIELD_NUMBER: _ClassVar[int]
    base_committed_length: int
    draft_token_ids: _containers.RepeatedScalarFieldContainer[int]
    parent_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, base_committed_length: _Optional[int] = ..., draft_token_ids: _Optional[_Iterable[int]] = ..., parent_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("opened", "result")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    opened: VerifyOpened
    result: VerifyResult
    def __init__(self, opened: _Optional[_Union[VerifyOpened, _Mapping]] = ..., result: _Optional[_Union[VerifyResult, _Mapping]] = ...) -> None: ...

class VerifyOpened(_message.Message):
    __slots__ = ("handshake", "first", "target_state_refusal", "drafter_state_refusals", "num_reused_tokens")
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    TARGET_STATE_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_STATE_REFUSALS_FIELD_NUMBER: _ClassVar[int]
    NUM_REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handshake: _common_pb2.Handshake
    first: VerifyResult
    target_state_refusal: str
    drafter_state_refusals: _containers.RepeatedScalarFieldContainer[str]
    num_reused_tokens: int
    def __init__(self, handshake: _Optional[_Union[_common_pb2.Handshake, _Mapping]] = ..., first: _Optional[_Union[VerifyResult, _Mapping]] = ..., target_state_refusal: _Optional[str] = ..., drafter_state_refusals: _Optional[_Iterable[str]] = ..., num_reused_tokens: _Optional[int] = ...) -> None: ...

class VerifyResult(_message.Message):
    __slots__ = ("num_accepted_tokens", "bonus_token_id", "committed_length", "cached_length", "finish_reason", "logprobs", "target_state", "timings", "accepted_node_indices", "load")
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BONUS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CACHED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_STATE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_NODE_INDICES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    num_accepted_tokens: int
    bonus_token_id: int
    committed_length: int
    cached_length: int
    finish_reason: FinishReason
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    target_state: _target_state_pb2.TargetStateRef
    timings: _common_pb2.PhaseTimings
    accepted_node_indices: _containers.RepeatedScalarFieldContainer[int]
    load: _common_pb2.Load
    def __init__(self, num_accepted_tokens: _Optional[int] = ..., bonus_token_id: _Optional[int] = ..., committed_length: _Optional[int] = ..., cached_length: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., target_state: _Optional[_Union[_target_state_pb2.TargetStateRef, _Mapping]] = ..., timings: _Optional[_Union[_common_pb2.PhaseTimings, _Mapping]] = ..., accepted_node_indices: _Optional[_Iterable[int]] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ...) -> None: ...

class VerifierServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifierServiceGetInfoResponse(_message.Message):
    __slots__ = ("protocol_version", "model", "max_draft_nodes", "kv_capacity_tokens", "kv_free_tokens", "max_sessions", "num_sessions", "eos_token_ids", "state_storage", "num_state_sessions", "num_state_streams", "min_protocol_version", "load", "takes_output_formats")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_NODES_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STATE_STORAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_STATE_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MIN_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TAKES_OUTPUT_FORMATS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model: _common_pb2.ModelInfo
    max_draft_nodes: int
    kv_capacity_tokens: int
    kv_free_tokens: int
    max_sessions: int
    num_sessions: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    state_storage: _target_state_pb2.StateStorage
    num_state_sessions: int
    num_state_streams: int
    min_protocol_version: int
    load: _common_pb2.Load
    takes_output_formats: bool
    def __init__(self, protocol_version: _Optional[int] = ..., model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., max_draft_nodes: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., kv_free_tokens: _Optional[int] = ..., max_sessions: _Optional[int] = ..., num_sessions: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., state_storage: _Optional[_Union[_target_state_pb2.StateStorage, str]] = ..., num_state_sessions: _Optional[int] = ..., num_state_streams: _Optional[int] = ..., min_protocol_version: _Optional[int] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ..., takes_output_formats: _Optional[bool] = ...) -> None: ...

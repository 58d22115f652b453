from specdec.v1 import common_pb2 as _common_pb2
from specdec.v1 import target_state_pb2 as _target_state_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftRequest(_message.Message):
    __slots__ = ("open", "round", "traceparent")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    open: DraftOpen
    round: DraftRound
    traceparent: str
    def __init__(self, open: _Optional[_Union[DraftOpen, _Mapping]] = ..., round: _Optional[_Union[DraftRound, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class DraftManyRequest(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("session", "change", "request", "timeout_ms")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        CHANGE_FIELD_NUMBER: _ClassVar[int]
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
        session: int
        change: _common_pb2.SessionChange
        request: DraftRequest
        timeout_ms: int
        def __init__(self, session: _Optional[int] = ..., change: _Optional[_Union[_common_pb2.SessionChange, str]] = ..., request: _Optional[_Union[DraftRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[DraftManyRequest.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[DraftManyRequest.Item, _Mapping]]] = ...) -> None: ...

class DraftManyResponse(_message.Message):
    __slots__ = ("items",)
    class Item(_message.Message):
        __slots__ = ("session", "response", "end")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        RESPONSE_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        session: int
        response: DraftResponse
        end: _common_pb2.SessionEnd
        def __init__(self, session: _Optional[int] = ..., response: _Optional[_Union[DraftResponse, _Mapping]] = ..., end: _Optional[_Union[_common_pb2.SessionEnd, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[DraftManyResponse.Item]
    def __init__(self, items: _Optional[_Iterable[_Union[DraftManyResponse.Item, _Mapping]]] = ...) -> None: ...

class DraftOpen(_message.Message):
    __slots__ = ("handshake", "drafter", "committed_token_ids", "prompt_length", "sampling", "max_length", "min_draft_confidence", "request_id", "caller_key", "cache_salt")
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MIN_DRAFT_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CALLER_KEY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    handshake: _common_pb2.Handshake
    drafter: str
    committed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_length: int
    sampling: _common_pb2.SamplingParams
    max_length: int
    min_draft_confidence: float
    request_id: str
    caller_key: str
    cache_salt: str
    def __init__(self, handshake: _Optional[_Union[_common_pb2.Handshake, _Mapping]] = ..., drafter: _Optional[str] = ..., committed_token_ids: _Optional[_Iterable[int]] = ..., prompt_length: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., max_length: _Optional[int] = ..., min_draft_confidence: _Optional[float] = ..., request_id: _Optional[str] = ..., caller_key: _Optional[str] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class DraftRound(_message.Message):
    __slots__ = ("committed_token_ids", "committed_length", "draft_depth", "target_state", "draft_nodes", "min_path_confidence")
    COMMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DRAFT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    TARGET_STATE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NODES_FIELD_NUMBER: _ClassVar[int]
    MIN_PATH_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    committed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    committed_length: int
    draft_depth: int
    target_state: _target_state_pb2.TargetStateRef
    draft_nodes: int
    min_path_confidence: float
    def __init__(self, committed_token_ids: _Optional[_Iterable[int]] = ..., committed_length: _Optional[int] = ..., draft_depth: _Optional[int] = ..., target_state: _Optional[_Union[_target_state_pb2.TargetStateRef, _Mapping]] = ..., draft_nodes: _Optional[int] = ..., min_path_confidence: _Optional[float] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("opened", "result")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    opened: DraftOpened
    result: DraftResult
    def __init__(self, opened: _Optional[_Union[DraftOpened, _Mapping]] = ..., result: _Optional[_Union[DraftResult, _Mapping]] = ...) -> None: ...

class DraftOpened(_message.Message):
    __slots__ = ("handshake", "timings", "load")
    HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    handshake: _common_pb2.Handshake
    timings: _common_pb2.PhaseTimings
    load: _common_pb2.Load
    def __init__(self, handshake: _Optional[_Union[_common_pb2.Handshake, _Mapping]] = ..., timings: _Optional[_Union[_common_pb2.PhaseTimings, _Mapping]] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ...) -> None: ...

class DraftResult(_message.Message):
    __slots__ = ("draft_token_ids", "parent_indices", "timings", "load")
    DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENT_INDICES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    draft_token_ids: _containers.RepeatedScalarFieldContainer[int]
    parent_indices: _containers.RepeatedScalarFieldContainer[int]
    timings: _common_pb2.PhaseTimings
    load: _common_pb2.Load
    def __init__(self, draft_token_ids: _Optional[_Iterable[int]] = ..., parent_indices: _Optional[_Iterable[int]] = ..., timings: _Optional[_Union[_common_pb2.PhaseTimings, _Mapping]] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ...) -> None: ...

class DrafterServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrafterInfo(_message.Message):
    __slots__ = ("name", "family", "model", "max_draft_depth", "default_draft_depth", "target_state_spec", "max_draft_nodes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_DRAFT_DEPTH_FIELD_NUMBER: _ClassVar[int]
    TARGET_STATE_SPEC_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_NODES_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    model: _common_pb2.ModelInfo
    max_draft_depth: int
    default_draft_depth: int
    target_state_spec: _target_state_pb2.TargetStateSpec
    max_draft_nodes: int
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., max_draft_depth: _Optional[int] = ..., default_draft_depth: _Optional[int] = ..., target_state_spec: _Optional[_Union[_target_state_pb2.TargetStateSpec, _Mapping]] = ..., max_draft_nodes: _Optional[int] = ...) -> None: ...

class DrafterServiceGetInfoResponse(_message.Message):
    __slots__ = ("protocol_version", "drafters", "max_sessions", "num_sessions", "state_links", "min_protocol_version", "load")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    STATE_LINKS_FIELD_NUMBER: _ClassVar[int]
    MIN_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    drafters: _containers.RepeatedCompositeFieldContainer[DrafterInfo]
    max_sessions: int
    num_sessions: int
    state_links: _containers.RepeatedCompositeFieldContainer[StateLink]
    min_protocol_version: int
    load: _common_pb2.Load
    def __init__(self, protocol_version: _Optional[int] = ..., drafters: _Optional[_Iterable[_Union[DrafterInfo, _Mapping]]] = ..., max_sessions: _Optional[int] = ..., num_sessions: _Optional[int] = ..., state_links: _Optional[_Iterable[_Union[StateLink, _Mapping]]] = ..., min_protocol_version: _Optional[int] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ...) -> None: ...

class StateLink(_message.Message):
    __slots__ = ("verifier_uri", "storage", "num_sessions", "fallback_reason")
    VERIFIER_URI_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    verifier_uri: str
    storage: _target_state_pb2.StateStorage
    num_sessions: int
    fallback_reason: str
    def __init__(self, verifier_uri: _Optional[str] = ..., storage: _Optional[_Union[_target_state_pb2.StateStorage, str]] = ..., num_sessions: _Optional[int] = ..., fallback_reason: _Optional[str] = ...) -> None: ...

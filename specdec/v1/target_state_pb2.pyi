from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StateStorage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_STORAGE_UNSPECIFIED: _ClassVar[StateStorage]
    STATE_STORAGE_SHARED_MEMORY: _ClassVar[StateStorage]
    STATE_STORAGE_CUDA_IPC: _ClassVar[StateStorage]
    STATE_STORAGE_STREAM: _ClassVar[StateStorage]
STATE_STORAGE_UNSPECIFIED: StateStorage
STATE_STORAGE_SHARED_MEMORY: StateStorage
STATE_STORAGE_CUDA_IPC: StateStorage
STATE_STORAGE_STREAM: StateStorage

class TargetStateSpec(_message.Message):
    __slots__ = ("hidden_layer_ids", "last_hidden_state", "kv_layer_ids", "kv_last_of_each_attention_type", "projection")
    HIDDEN_LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_STATE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_LAST_OF_EACH_ATTENTION_TYPE_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    hidden_layer_ids: _containers.RepeatedScalarFieldContainer[int]
    last_hidden_state: bool
    kv_layer_ids: _containers.RepeatedScalarFieldContainer[int]
    kv_last_of_each_attention_type: bool
    projection: Projection
    def __init__(self, hidden_layer_ids: _Optional[_Iterable[int]] = ..., last_hidden_state: _Optional[bool] = ..., kv_layer_ids: _Optional[_Iterable[int]] = ..., kv_last_of_each_attention_type: _Optional[bool] = ..., projection: _Optional[_Union[Projection, _Mapping]] = ...) -> None: ...

class Projection(_message.Message):
    __slots__ = ("sha256", "output_size", "input_size", "norm_epsilon", "dtype")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    NORM_EPSILON_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    output_size: int
    input_size: int
    norm_epsilon: float
    dtype: str
    def __init__(self, sha256: _Optional[str] = ..., output_size: _Optional[int] = ..., input_size: _Optional[int] = ..., norm_epsilon: _Optional[float] = ..., dtype: _Optional[str] = ...) -> None: ...

class PutProjectionRequest(_message.Message):
    __slots__ = ("projection", "data")
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    projection: Projection
    data: bytes
    def __init__(self, projection: _Optional[_Union[Projection, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutProjectionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("path", "offset", "boot_id")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    boot_id: str
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ..., boot_id: _Optional[str] = ...) -> None: ...

class CudaIpc(_message.Message):
    __slots__ = ("device_uuid", "memory_handle", "offset", "event_handle", "size")
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    EVENT_HANDLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    device_uuid: str
    memory_handle: bytes
    offset: int
    event_handle: bytes
    size: int
    def __init__(self, device_uuid: _Optional[str] = ..., memory_handle: _Optional[bytes] = ..., offset: _Optional[int] = ..., event_handle: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Stream(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TensorRef(_message.Message):
    __slots__ = ("name", "dtype", "shape", "shared_memory", "cuda_ipc", "stream", "attention_type")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    shared_memory: SharedMemory
    cuda_ipc: CudaIpc
    stream: Stream
    attention_type: str
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., cuda_ipc: _Optional[_Union[CudaIpc, _Mapping]] = ..., stream: _Optional[_Union[Stream, _Mapping]] = ..., attention_type: _Optional[str] = ...) -> None: ...

class TargetStateRef(_message.Message):
    __slots__ = ("session_id", "verifier_uri", "cached_length", "generation", "tensors", "block_ids", "block_tokens", "projection_sha256", "num_shared_blocks", "num_known_blocks", "max_length", "window")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_URI_FIELD_NUMBER: _ClassVar[int]
    CACHED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_KNOWN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    verifier_uri: str
    cached_length: int
    generation: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorRef]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    block_tokens: int
    projection_sha256: str
    num_shared_blocks: int
    num_known_blocks: int
    max_length: int
    window: WindowBlocks
    def __init__(self, session_id: _Optional[str] = ..., verifier_uri: _Optional[str] = ..., cached_length: _Optional[int] = ..., generation: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorRef, _Mapping]]] = ..., block_ids: _Optional[_Iterable[int]] = ..., block_tokens: _Optional[int] = ..., projection_sha256: _Optional[str] = ..., num_shared_blocks: _Optional[int] = ..., num_known_blocks: _Optional[int] = ..., max_length: _Optional[int] = ..., window: _Optional[_Union[WindowBlocks, _Mapping]] = ...) -> None: ...

class WindowBlocks(_message.Message):
    __slots__ = ("num_positions", "num_gone_blocks", "block_ids", "generations", "first_generation")
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_GONE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    FIRST_GENERATION_FIELD_NUMBER: _ClassVar[int]
    num_positions: int
    num_gone_blocks: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    first_generation: int
    def __init__(self, num_positions: _Optional[int] = ..., num_gone_blocks: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., first_generation: _Optional[int] = ...) -> None: ...

class StreamTargetStateRequest(_message.Message):
    __slots__ = ("session_id", "start_position", "projection_sha256", "tensor_names")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSOR_NAMES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    start_position: int
    projection_sha256: str
    tensor_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[str] = ..., start_position: _Optional[int] = ..., projection_sha256: _Optional[str] = ..., tensor_names: _Optional[_Iterable[str]] = ...) -> None: ...

class StreamTargetStateResponse(_message.Message):
    __slots__ = ("start_position", "num_positions", "tensors")
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    start_position: int
    num_positions: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorRows]
    def __init__(self, start_position: _Optional[int] = ..., num_positions: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorRows, _Mapping]]] = ...) -> None: ...

class TensorRows(_message.Message):
    __slots__ = ("name", "data", "num_gone_positions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    NUM_GONE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    num_gone_positions: int
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ..., num_gone_positions: _Optional[int] = ...) -> None: ...

class GetTargetWeightsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTargetWeightsResponse(_message.Message):
    __slots__ = ("model_id", "embedding", "embedding_scale", "lm_head", "final_logit_softcap")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_SCALE_FIELD_NUMBER: _ClassVar[int]
    LM_HEAD_FIELD_NUMBER: _ClassVar[int]
    FINAL_LOGIT_SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    embedding: TensorRef
    embedding_scale: float
    lm_head: TensorRef
    final_logit_softcap: float
    def __init__(self, model_id: _Optional[str] = ..., embedding: _Optional[_Union[TensorRef, _Mapping]] = ..., embedding_scale: _Optional[float] = ..., lm_head: _Optional[_Union[TensorRef, _Mapping]] = ..., final_logit_softcap: _Optional[float] = ...) -> None: ...

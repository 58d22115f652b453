from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TargetStateSpec(_message.Message):
    __slots__ = ("hidden_layer_ids", "last_hidden_state", "kv_layer_ids", "kv_last_of_each_attention_type")
    HIDDEN_LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_STATE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_LAST_OF_EACH_ATTENTION_TYPE_FIELD_NUMBER: _ClassVar[int]
    hidden_layer_ids: _containers.RepeatedScalarFieldContainer[int]
    last_hidden_state: bool
    kv_layer_ids: _containers.RepeatedScalarFieldContainer[int]
    kv_last_of_each_attention_type: bool
    def __init__(self, hidden_layer_ids: _Optional[_Iterable[int]] = ..., last_hidden_state: _Optional[bool] = ..., kv_layer_ids: _Optional[_Iterable[int]] = ..., kv_last_of_each_attention_type: _Optional[bool] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("path", "offset")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class CudaIpc(_message.Message):
    __slots__ = ("device_uuid", "memory_handle", "offset", "event_handle")
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    EVENT_HANDLE_FIELD_NUMBER: _ClassVar[int]
    device_uuid: str
    memory_handle: bytes
    offset: int
    event_handle: bytes
    def __init__(self, device_uuid: _Optional[str] = ..., memory_handle: _Optional[bytes] = ..., offset: _Optional[int] = ..., event_handle: _Optional[bytes] = ...) -> None: ...

class Stream(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TensorRef(_message.Message):
    __slots__ = ("name", "dtype", "shape", "shared_memory", "cuda_ipc", "stream")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    shared_memory: SharedMemory
    cuda_ipc: CudaIpc
    stream: Stream
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., cuda_ipc: _Optional[_Union[CudaIpc, _Mapping]] = ..., stream: _Optional[_Union[Stream, _Mapping]] = ...) -> None: ...

class TargetStateRef(_message.Message):
    __slots__ = ("session_id", "verifier_uri", "cached_length", "generation", "tensors")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_URI_FIELD_NUMBER: _ClassVar[int]
    CACHED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    verifier_uri: str
    cached_length: int
    generation: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorRef]
    def __init__(self, session_id: _Optional[str] = ..., verifier_uri: _Optional[str] = ..., cached_length: _Optional[int] = ..., generation: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorRef, _Mapping]]] = ...) -> None: ...

class StreamTargetStateRequest(_message.Message):
    __slots__ = ("session_id", "start_position")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    start_position: int
    def __init__(self, session_id: _Optional[str] = ..., start_position: _Optional[int] = ...) -> None: ...

class StreamTargetStateResponse(_message.Message):
    __slots__ = ("name", "start_position", "num_positions", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_position: int
    num_positions: int
    data: bytes
    def __init__(self, name: _Optional[str] = ..., start_position: _Optional[int] = ..., num_positions: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

"""What a drafter reads of the target, and where it is: the messages of target_state.proto as dataclasses."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specdec.v1 import target_state_pb2 as pb

GENERATIONS = "generations"
"""Name of the tensor that says which generation each block of the pool belongs to."""
LAST_HIDDEN = "last_hidden"
"""Name of the hidden state after the final norm."""
PROJECTED = "projected"
"""Name of the projected hidden states."""
SLIDING_ATTENTION = "sliding_attention"
"""The attention type of layers that see the last positions only."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def hidden_name(layer_id: int) -> str:
    """Name of the hidden state after a layer."""
    return f"hidden.{layer_id}"


def key_name(layer_id: int) -> str:
    """Name of a layer's keys."""
    return f"kv.{layer_id}.key"


def value_name(layer_id: int) -> str:
    """Name of a layer's values."""
    return f"kv.{layer_id}.value"


def boot_id() -> str:
    """Return the identity of this host until it boots again; it is empty where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class StateStorage(enum.Enum):
    """How a drafter gets at target state."""

    SHARED_MEMORY = "shared_memory"
    CUDA_IPC = "cuda_ipc"
    STREAM = "stream"


STORAGE_TO_PROTO: Mapping[StateStorage, pb.StateStorage] = {
    StateStorage.SHARED_MEMORY: pb.STATE_STORAGE_SHARED_MEMORY,
    StateStorage.CUDA_IPC: pb.STATE_STORAGE_CUDA_IPC,
    StateStorage.STREAM: pb.STATE_STORAGE_STREAM,
}


@dataclass(frozen=True, slots=True)
class ProjectionInfo:
    """A projection of hidden states, known by its weights' checksum; see specdec.v1.Projection."""

    sha256: str
    input_size: int
    output_size: int
    norm_epsilon: float
    dtype: str

    def to_proto(self) -> pb.Projection:
        """Return the message of the projection."""
        return pb.Projection(
            sha256=self.sha256,
            input_size=self.input_size,
            output_size=self.output_size,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
        )

    @classmethod
    def from_proto(cls, message: pb.Projection) -> ProjectionInfo:
        """Read the message."""
        return cls(
            message.sha256, message.input_size, message.output_size, message.norm_epsilon, message.dtype
        )


@dataclass(frozen=True, slots=True)
class TargetStateSpec:
    """What a drafter needs of the target; see specdec.v1.TargetStateSpec."""

    hidden_layer_ids: tuple[int, ...] = ()
    last_hidden_state: bool = False
    kv_layer_ids: tuple[int, ...] = ()
    kv_last_of_each_attention_type: bool = False
    projection: ProjectionInfo | None = None

    @property
    def hidden_names(self) -> tuple[str, ...]:
        """Names of its layers' hidden states, each once: what a projection takes the place of."""
        return tuple(hidden_name(layer_id) for layer_id in dict.fromkeys(self.hidden_layer_ids))

    def read_of(self, tensors: Sequence[TensorRef]) -> tuple[str, ...]:
        """Return the names of the tensors that a drafter of the spec reads, where a session exports these."""
        kv_layers = [f"kv.{layer_id}" for layer_id in self.kv_layer_ids]
        if self.kv_last_of_each_attention_type:
            last = {ref.attention_type: ref.name.rpartition(".")[0] for ref in tensors if ref.attention_type}
            kv_layers += last.values()
        kv_names = [f"{layer}.{part}" for layer in dict.fromkeys(kv_layers) for part in ("key", "value")]
        return (*self.hidden_names, *[LAST_HIDDEN] * self.last_hidden_state, *kv_names)

    def union(self, other: TargetStateSpec) -> TargetStateSpec:
        """Return what serves drafters of both specs.

        A projection is of all hidden states in a spec, in order. So the union of specs whose hidden states or
        projections differ has none, and their drafters project for themselves.
        """
        hidden = (self.hidden_layer_ids, self.projection), (other.hidden_layer_ids, other.projection)
        layer_ids, projection = next((one for one in hidden if one[0]), hidden[0])
        if any(one[0] and one != (layer_ids, projection) for one in hidden):
            layer_ids = tuple(dict.fromkeys((*self.hidden_layer_ids, *other.hidden_layer_ids)))
            projection = None
        return TargetStateSpec(
            layer_ids,
            self.last_hidden_state or other.last_hidden_state,
            tuple(dict.fromkeys((*self.kv_layer_ids, *other.kv_layer_ids))),
            self.kv_last_of_each_attention_type or other.kv_last_of_each_attention_type,
            projection,
        )

    def serves(self, other: TargetStateSpec) -> bool:
        """Whether a session that exports this has all that a drafter of the other spec reads."""
        return (
            set(other.hidden_layer_ids) <= set(self.hidden_layer_ids)
            and self.last_hidden_state >= other.last_hidden_state
            and set(other.kv_layer_ids) <= set(self.kv_layer_ids)
            and self.kv_last_of_each_attention_type >= other.kv_last_of_each_attention_type
        )

    def to_proto(self) -> pb.TargetStateSpec:
        """Return the message of the spec."""
        return pb.TargetStateSpec(
            hidden_layer_ids=self.hidden_layer_ids,
            last_hidden_state=self.last_hidden_state,
            kv_layer_ids=self.kv_layer_ids,
            kv_last_of_each_attention_type=self.kv_last_of_each_attention_type,
            projection=self.projection.to_proto() if self.projection else None,
        )

    @classmethod
    def from_proto(cls, message: pb.TargetStateSpec) -> TargetStateSpec:
        """Read the message."""
        return cls(
            hidden_layer_ids=tuple(message.hidden_layer_ids),
            last_hidden_state=message.last_hidden_state,
            kv_layer_ids=tuple(message.kv_layer_ids),
            kv_last_of_each_attention_type=message.kv_last_of_each_attention_type,
            projection=(
                ProjectionInfo.from_proto(message.projection) if message.HasField("projection") else None
            ),
        )


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A tensor in a file of this host; see specdec.v1.SharedMemory."""

    path: str
    offset: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class CudaIpc:
    """A tensor in the memory of a GPU; see specdec.v1.CudaIpc."""

    device_uuid: str
    memory_handle: bytes
    offset: int
    event_handle: bytes
    size: int


Storage = SharedMemory | CudaIpc
"""Where a tensor can be mapped. None in its place: it can only be streamed."""


def storage_kind(storage: Storage | None) -> StateStorage:
    """Return how a tensor is reached."""
    match storage:
        case SharedMemory():
            return StateStorage.SHARED_MEMORY
        case CudaIpc():
            return StateStorage.CUDA_IPC
        case None:
            return StateStorage.STREAM


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor: what it is and where; see specdec.v1.TensorRef."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: Storage | None = None
    attention_type: str = ""

    def to_proto(self) -> pb.TensorRef:
        """Return the message of the tensor's place."""
        message = pb.TensorRef(
            name=self.name, dtype=self.dtype, shape=self.shape, attention_type=self.attention_type
        )
        match self.storage:
            case SharedMemory(path, offset, boot):
                message.shared_memory.CopyFrom(pb.SharedMemory(path=path, offset=offset, boot_id=boot))
            case CudaIpc(uuid, memory_handle, offset, event_handle, size):
                message.cuda_ipc.CopyFrom(
                    pb.CudaIpc(
                        device_uuid=uuid,
                        memory_handle=memory_handle,
                        offset=offset,
                        event_handle=event_handle,
                        size=size,
                    )
                )
            case None:
                message.stream.SetInParent()
        return message

    @classmethod
    def from_proto(cls, message: pb.TensorRef) -> TensorRef:
        """Read the message."""
        storage: Storage | None = None
        match message.WhichOneof("storage"):
            case "shared_memory":
                shared = message.shared_memory
                storage = SharedMemory(shared.path, shared.offset, shared.boot_id)
            case "cuda_ipc":
                ipc = message.cuda_ipc
                storage = CudaIpc(ipc.device_uuid, ipc.memory_handle, ipc.offset, ipc.event_handle, ipc.size)
        return cls(message.name, message.dtype, tuple(message.shape), storage, message.attention_type)


@dataclass(frozen=True, slots=True)
class WindowBlocks:
    """Where the last positions of a session are in layers with sliding attention; see
    specdec.v1.WindowBlocks."""

    num_positions: int
    num_gone_blocks: int = 0
    block_ids: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    first_generation: int = 0

    def first(self, length: int) -> int:
        """Return the first position that may be read, of so many."""
        return max(0, length - self.num_positions)

    def to_proto(self) -> pb.WindowBlocks:
        """Return the message."""
        return pb.WindowBlocks(
            num_positions=self.num_positions,
            num_gone_blocks=self.num_gone_blocks,
            block_ids=self.block_ids,
            generations=self.generations,
            first_generation=self.first_generation,
        )

    @classmethod
    def from_proto(cls, message: pb.WindowBlocks) -> WindowBlocks:
        """Read the message."""
        return cls(
            message.num_positions,
            message.num_gone_blocks,
            tuple(message.block_ids),
            tuple(message.generations),
            message.first_generation,
        )


@dataclass(frozen=True, slots=True)
class TargetStateRef:
    """A handle on a session's state; see specdec.v1.TargetStateRef."""

    session_id: str
    verifier_uri: str
    generation: int
    cached_length: int = 0
    tensors: tuple[TensorRef, ...] = field(default=(), repr=False)
    block_ids: tuple[int, ...] = field(default=(), repr=False)
    block_tokens: int = 0
    num_shared_blocks: int = field(default=0, repr=False)
    """How many of the blocks, the first, have no generation of the session's: others may use them too."""
    projection_sha256: str = field(default="", repr=False)
    """Checksum of the projection that the verifier makes for this session; empty: it makes none."""
    num_known_blocks: int = field(default=0, repr=False)
    """How many of the session's blocks come before `block_ids`: earlier handles named them."""
    max_length: int = field(default=0, repr=False)
    """Most positions that the session can have; 0: as many as the blocks hold."""
    window: WindowBlocks | None = field(default=None, repr=False)
    """Where the KV of layers with sliding attention is; None: it is in `block_ids`, or there is none."""

    def at(self, cached_length: int, blocks: Sequence[int] = ()) -> TargetStateRef:
        """Return the handle as later rounds carry it: lengths, and which blocks were added.

        Args:
            blocks: all that the session has, in order; they begin with `block_ids`. Empty: none was added.
        """
        num_known = len(self.block_ids)
        added = tuple(blocks[num_known:])
        return TargetStateRef(
            self.session_id,
            self.verifier_uri,
            self.generation,
            cached_length,
            block_ids=added,
            num_known_blocks=num_known if added else 0,
            window=self.window,
        )

    def to_proto(self) -> pb.TargetStateRef:
        """Return the message of the handle."""
        return pb.TargetStateRef(
            session_id=self.session_id,
            verifier_uri=self.verifier_uri,
            generation=self.generation,
            cached_length=self.cached_length,
            tensors=[tensor.to_proto() for tensor in self.tensors],
            block_ids=self.block_ids,
            block_tokens=self.block_tokens,
            num_shared_blocks=self.num_shared_blocks,
            projection_sha256=self.projection_sha256,
            num_known_blocks=self.num_known_blocks,
            max_length=self.max_length,
            window=self.window.to_proto() if self.window else None,
        )

    @classmethod
    def from_proto(cls, message: pb.TargetStateRef) -> TargetStateRef:
        """Read the message."""
        return cls(
            session_id=message.session_id,
            verifier_uri=message.verifier_uri,
            generation=message.generation,
            cached_length=message.cached_length,
            tensors=tuple(TensorRef.from_proto(tensor) for tensor in message.tensors),
            block_ids=tuple(message.block_ids),
            block_tokens=message.block_tokens,
            num_shared_blocks=message.num_shared_blocks,
            projection_sha256=message.projection_sha256,
            num_known_blocks=message.num_known_blocks,
            max_length=message.max_length,
            window=WindowBlocks.from_proto(message.window) if message.HasField("window") else None,
        )

"""Target state as drafters see it, the same whether it is mapped or was streamed; and its projection."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import (
    LAST_HIDDEN,
    PROJECTED,
    SLIDING_ATTENTION,
    ProjectionInfo,
    TargetStateSpec,
    TensorRef,
    hidden_name,
    key_name,
    value_name,
)
from specdec.runtime.kv_slots import KvAllocation
from specdec.runtime.memory import dtype_name, dtype_of
from specdec.runtime.prepack import multiplier


class Projection:
    """norm(fc(x)) of concatenated hidden states, as DFlash drafters use it (arXiv 2602.06036).

    Args:
        fc: [output_size, input_size].
        norm: weight of the RMS norm [output_size], of fc's type and device.
        epsilon: of the norm.
        info: what is known of it already; None: it is worked out.
    """

    def __init__(self, fc: Tensor, norm: Tensor, epsilon: float, info: ProjectionInfo | None = None) -> None:
        if fc.ndim != 2 or norm.shape != fc.shape[:1] or norm.dtype != fc.dtype:
            raise InvalidArgumentError(
                f"A projection needs fc [output, input] and a norm [output] of one type; these are "
                f"{list(fc.shape)} and {list(norm.shape)}."
            )
        self.fc, self.norm, self.epsilon = fc.contiguous(), norm.contiguous(), epsilon
        self.info = info or ProjectionInfo(
            sha256=self._checksum(),
            input_size=fc.shape[1],
            output_size=fc.shape[0],
            norm_epsilon=epsilon,
            dtype=dtype_name(fc.dtype),
        )

    @classmethod
    def from_bytes(cls, info: ProjectionInfo, data: bytearray) -> Projection:
        """Return the projection whose `to_bytes` is `data`.

        Raises:
            InvalidArgumentError: the data is of another size, or not what the checksum says.
        """
        if len(data) != num_projection_bytes(info):
            raise InvalidArgumentError(
                f"{len(data)} bytes are not a projection of {info.input_size} to {info.output_size}.",
                field="data",
            )
        flat = torch.frombuffer(data, dtype=dtype_of(info.dtype))
        fc, norm = flat[: -info.output_size].view(info.output_size, -1), flat[-info.output_size :]
        projection = cls(fc, norm, info.norm_epsilon)
        if projection.info.sha256 != info.sha256:
            raise InvalidArgumentError(
                "The projection's weights are not those its checksum names; send them again.", field="data"
            )
        return projection

    def to(self, device: torch.device) -> Projection:
        """Return the same projection on a device."""
        if device == self.fc.device:
            return self
        return Projection(self.fc.to(device), self.norm.to(device), self.epsilon, self.info)

    def to_bytes(self) -> bytes:
        """Return the weights as they are sent: fc, then the norm."""
        return b"".join(tensor_bytes(tensor) for tensor in (self.fc, self.norm))

    @cached_property
    def _multiply(self) -> Callable[[Tensor], Tensor]:
        return multiplier(self.fc)

    def _checksum(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.fc, self.norm):
            digest.update(tensor_bytes(tensor))
        digest.update(struct.pack("<d", self.epsilon))
        return digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """Project [num_positions, input_size] to [num_positions, output_size]."""
        projected = self._multiply(features.to(self.fc.dtype)).float()
        scale = torch.rsqrt(projected.square().mean(-1, keepdim=True) + self.epsilon)
        return self.norm * (projected * scale).to(self.norm.dtype)


def num_projection_bytes(info: ProjectionInfo) -> int:
    """Return the number of bytes of a projection's weights.

    Raises:
        FailedPreconditionError: its element type is unknown.
    """
    return dtype_of(info.dtype).itemsize * info.output_size * (info.input_size + 1)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the row-major bytes of a contiguous tensor.

    By way of numpy: on the CPU no torch operation runs, hence no second set of OpenMP threads, whatever
    thread this is called on.
    """
    return tensor.detach().cpu().view(torch.uint8).numpy().tobytes()


class TargetStateView:
    """What a drafter may read in a round: rows of positions below `length`.

    Args:
        spec: what the drafter asked for.
        tensors: by name, one row per slot.
        refs: the tensors as the verifier described them.
        allocation: the slots of the session's positions.
        length: positions that may be read.
        projection: of the hidden states, if the spec has one.
        first_in_window: the first of them that layers with sliding attention have, where they lack some.
    """

    def __init__(
        self,
        spec: TargetStateSpec,
        tensors: Mapping[str, Tensor],
        refs: Sequence[TensorRef],
        allocation: KvAllocation,
        length: int,
        projection: Projection | None = None,
        first_in_window: int = 0,
    ) -> None:
        self.spec = spec
        self.length = length
        self._tensors = tensors
        self._allocation = allocation
        self._projection = projection
        self._refs = refs
        self._first_in_window = first_in_window

    def first_row(self, name: str) -> int:
        """Return the first position of which a tensor has a row."""
        return self._first_in_window if name in self._window_names else 0

    def rows(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Return rows [stop - start, ...] of a tensor, as a view if the session's blocks are one run.

        Args:
            start: position of the first; None: of the first there is.
            stop: position after the last; None: all there are.
        """
        first = self.first_row(name)
        start = first if start is None else start
        stop = self.length if stop is None else stop
        assert first <= start <= stop <= self.length, "state is read below the cached length only"
        table = self._allocation.table(name in self._window_names)
        return self._tensors[name][table.slots(start, stop)]

    def hidden(self, layer_id: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the hidden states [positions, hidden_size] after a layer."""
        return self.rows(hidden_name(layer_id), start, stop)

    def last_hidden(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the hidden states [positions, hidden_size] after the final norm."""
        return self.rows(LAST_HIDDEN, start, stop)

    def kv(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [num_positions, num_heads, head_dim] of a layer: those of all positions,
        or of the last ones that a layer with sliding attention still has."""
        return self.rows(key_name(layer_id)), self.rows(value_name(layer_id))

    @cached_property
    def _window_names(self) -> frozenset[str]:
        """The tensors that may lack their first positions."""
        return frozenset(ref.name for ref in self._refs if ref.attention_type == SLIDING_ATTENTION)

    @cached_property
    def _layer_of_type(self) -> dict[str, int]:
        return {ref.attention_type: int(ref.name.split(".")[1]) for ref in self._refs if ref.attention_type}

    @property
    def attention_types(self) -> tuple[str, ...]:
        """Attention types whose KV is in the state."""
        return tuple(self._layer_of_type)

    def last_layer_of(self, attention_type: str) -> int:
        """Return the last layer of that attention type whose KV is in the state.

        Raises:
            KeyError: there is none.
        """
        return self._layer_of_type[attention_type]

    def features(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the hidden states of the spec's layers side by side [positions, input_size]."""
        parts = [self.hidden(layer_id, start, stop) for layer_id in self.spec.hidden_layer_ids]
        return torch.cat(parts, dim=-1)

    def projected(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the projected features [positions, output_size], made here unless they came projected."""
        if PROJECTED in self._tensors:
            return self.rows(PROJECTED, start, stop)
        assert self._projection is not None, "the spec has no projection"
        return self._projection(self.features(start, stop))

"""The target state that a drafter reads, for whole sequences: the serving path without the services."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter_service.training.data import TokenSequence
from specdec.contract.target_state import LAST_HIDDEN, hidden_name, key_name, value_name
from specdec.runtime.attention import Segment
from specdec.runtime.kv_pool import KvShape
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.packed_model import PackedModel


def pool_bytes(shapes: Mapping[int, KvShape], dtype: torch.dtype, num_tokens: int) -> int:
    """Return the size of a pool that holds `num_tokens` tokens of a target, bytes.

    Args:
        shapes: geometry of the target's KV, by layer.
    """
    token_bytes = dtype.itemsize * sum(shape.num_elements for shape in shapes.values())
    return _in_blocks(num_tokens) * token_bytes


def _in_blocks(num_tokens: int) -> int:
    """Return the number of tokens that a sequence occupies in a pool, which has blocks."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class SequenceFeatures:
    """A sequence and the target's state for it."""

    token_ids: Tensor  # [num_tokens]
    prompt_length: int
    states: dict[str, Tensor]
    """States [num_tokens, ...] by their names in a target state handle."""

    @property
    def last_hidden(self) -> Tensor:
        """Hidden states after the final norm [num_tokens, hidden_size]."""
        return self.states[LAST_HIDDEN]

    def hidden(self, layers: Sequence[int]) -> Tensor:
        """Return the hidden states after some layers, side by side [num_tokens, len(layers) *
        hidden_size]."""
        return torch.cat([self.states[hidden_name(layer)] for layer in layers], dim=-1)

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer [num_tokens, num_heads, head_dim]."""
        return self.states[key_name(layer)], self.states[value_name(layer)]


class FeatureSource:
    """Runs the target over packed sequences and copies their state out of its pool.

    Args:
        kv_layers: layers whose keys and values are copied.
        hidden_layers: layers whose output is copied.
    """

    def __init__(
        self, target: PackedModel, *, kv_layers: Sequence[int] = (), hidden_layers: Sequence[int] = ()
    ) -> None:
        self._target = target
        self._hidden = [LAST_HIDDEN, *(hidden_name(layer) for layer in hidden_layers)]
        self._names = [*self._hidden]
        self._names += [name(layer) for layer in kv_layers for name in (key_name, value_name)]
        for name in self._hidden:
            target.pool.add_hidden(name, target.model.config.get_text_config().hidden_size)

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[SequenceFeatures]:
        """Return the state of every sequence, in as many passes as the pool has room for.

        Raises:
            InvalidArgumentError: a sequence is longer than the whole pool.
        """
        return [features for part in self._passes(sequences) for features in self._run(part)]

    def _passes(self, sequences: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
        """Yield as many sequences at a time as there is room for."""
        part: list[TokenSequence] = []
        num_left = self._target.pool.free_tokens
        for sequence in sequences:
            size = _in_blocks(len(sequence.token_ids))
            if part and size > num_left:
                yield part
                part, num_left = [], self._target.pool.free_tokens
            part.append(sequence)
            num_left -= size
        if part:
            yield part

    def _run(self, sequences: Sequence[TokenSequence]) -> list[SequenceFeatures]:
        """Return the state of every sequence, in one pass."""
        pool = self._target.pool
        with ExitStack() as stack:
            segments = []
            for sequence in sequences:
                allocation = pool.allocate(len(sequence.token_ids))
                stack.callback(pool.free, allocation)
                segments.append(Segment(allocation, 0, sequence.token_ids, 0))
            self._target.forward(segments, set(self._hidden))
            return [
                SequenceFeatures(
                    torch.tensor(segment.token_ids, device=pool.device),
                    sequence.prompt_length,
                    {
                        name: pool.tensor(name)[segment.allocation.slots(0, segment.stop)].clone()
                        for name in self._names
                    },
                )
                for segment, sequence in zip(segments, sequences, strict=True)
            ]

"""What a drafter reads of its target, for whole sequences: the serving path, without the services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter_service.training.data import TokenSequence
from specdec.runtime.attention import Segment
from specdec.runtime.packed_model import PackedModel
from specdec.target_state import LAST_HIDDEN, hidden_name, key_name, value_name

POOL_BYTES = 2**28
"""The target's KV while it reads a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class SequenceFeatures:
    """A sequence and the target's state of it."""

    token_ids: Tensor  # [num_tokens]
    prompt_length: int
    states: dict[str, Tensor]
    """By name, as in a target state handle: [num_tokens, ...]."""

    @property
    def last_hidden(self) -> Tensor:
        """Hidden states after the final norm [num_tokens, hidden_size]."""
        return self.states[LAST_HIDDEN]

    def hidden(self, layers: Sequence[int]) -> Tensor:
        """Hidden states after some layers side by side [num_tokens, len(layers) * hidden_size]."""
        return torch.cat([self.states[hidden_name(layer)] for layer in layers], dim=-1)

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [num_tokens, num_heads, head_dim] of a layer."""
        return self.states[key_name(layer)], self.states[value_name(layer)]


class FeatureSource:
    """Runs the target over packed sequences and copies their state out of its pool.

    Args:
        kv_layers: layers whose keys and values are wanted.
        hidden_layers: layers whose output is wanted.
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
        """The state of every sequence, in one pass."""
        pool = self._target.pool
        allocations = [pool.allocate(len(sequence.token_ids)) for sequence in sequences]
        segments = [
            Segment(allocation, 0, sequence.token_ids, 0)
            for allocation, sequence in zip(allocations, sequences, strict=True)
        ]
        self._target.forward(segments, set(self._hidden))
        features = [
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
        for allocation in allocations:
            pool.free(allocation)
        return features

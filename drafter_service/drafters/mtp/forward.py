"""A draft step of an MTP assistant, written out: the decoder's layers over keys and values of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafter_service.drafters.mtp.layers import AssistantLayers, TargetKv
from specdec.runtime.decoder.families import final_norm_of, fused, layer_of, rotaries_of, why_not
from specdec.runtime.decoder.layers import AttentionShape, RotaryTable
from specdec.runtime.prepack import prepack_linears


class AssistantForward:
    """A draft step without the head; it takes the assistant's layers over.

    Args:
        model: an assistant that `why_not` has no objection to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        source: Any = model
        decoder = source.model
        self._dtype = model.dtype
        self._rotaries = rotaries_of(decoder)
        self._before, self._after = fused([source.pre_projection]), fused([source.post_projection])
        self._layers = [layer_of(decoder, index) for index in range(len(decoder.layers))]
        self._norm = final_norm_of(decoder)
        self._positions: tuple[int, ...] = ()
        self._tables: Mapping[str, RotaryTable] = {}
        del decoder.layers, source.pre_projection, source.post_projection

    def step(
        self, embeddings: Tensor, hidden: Tensor, positions: Sequence[int], kv: Mapping[str, TargetKv]
    ) -> tuple[Tensor, Tensor]:
        """Take one step for rows of any number of sessions; see `AssistantLayers.step`."""
        x = self._before(torch.cat([embeddings, hidden], dim=-1))
        tables, attended = self._tables_at(positions, x.device), _TargetLayers(kv)
        for layer in self._layers:
            x = layer(x, tables, attended)
        states = self._norm(x)
        return states, self._after(states)

    def _tables_at(self, positions: Sequence[int], device: torch.device) -> Mapping[str, RotaryTable]:
        """Return the rotary tables; all steps of a round have the same positions, most often just one."""
        rows = tuple(positions[:1] if len(set(positions)) == 1 else positions)
        if rows != self._positions:
            at = torch.tensor(rows, device=device)
            self._tables = {name: rotary.table(at, self._dtype) for name, rotary in self._rotaries.items()}
            self._positions = rows
        return self._tables


def assistant_step(model: PreTrainedModel) -> AssistantForward | AssistantLayers:
    """Return what takes an assistant's draft steps: its layers written out, or its own code otherwise."""
    if why_not(model):
        prepack_linears(model, keep=model.get_output_embeddings())
        return AssistantLayers(model)
    return AssistantForward(model)


class _TargetLayers:
    """The target's keys and values, as layers ask for them."""

    def __init__(self, kv: Mapping[str, TargetKv]) -> None:
        self._kv = kv

    def store(self, shape: AttentionShape, keys: Tensor, values: Tensor) -> None:
        """Refuse: an assistant has no keys of its own."""
        raise NotImplementedError

    def attend(self, shape: AttentionShape, heads: Tensor) -> Tensor:
        """Attend from heads [rows, num_heads, head_dim]; return [rows, num_heads * head_dim]."""
        attended = self._kv[shape.rotary].attend(heads.transpose(0, 1), shape.scaling, shape.window or None)
        return attended.transpose(0, 1).flatten(1)

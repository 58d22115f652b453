"""DFlash's draft pass, written out: the decoder's layers over a context and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MuseGlimmerAssistantModel

from drafter_service.drafters.dflash.layers import BlockKv
from specdec.runtime.decoder.families import final_norm_of, layer_of, rotaries_of
from specdec.runtime.decoder.layers import AttentionShape, Layer


class BlockForward:
    """A draft pass without context projection and head; it takes the model's layers over.

    Args:
        changes: what is made of each layer; empty: they stay as they are.
    """

    def __init__(
        self, model: MuseGlimmerAssistantModel, changes: Sequence[Callable[[Layer], Layer]] = ()
    ) -> None:
        decoder: Any = model
        self._rotaries = rotaries_of(decoder)
        self._layers = [layer_of(decoder, index) for index in range(len(decoder.layers))]
        if changes:
            self._layers = [change(layer) for change, layer in zip(changes, self._layers, strict=True)]
        self._norm = final_norm_of(decoder)
        del decoder.layers, decoder.encoder

    def __call__(
        self, context: Tensor, embeddings: Tensor, context_positions: Tensor, positions: Tensor, kv: BlockKv
    ) -> Tensor:
        """Return the states that the head reads [num_rows, hidden_size]; see `BlockLayers`."""
        at = torch.cat([context_positions, positions])
        tables = {name: rotary.table(at, embeddings.dtype) for name, rotary in self._rotaries.items()}
        x, blocks = embeddings, _BlockLayers(kv, len(context))
        for layer in self._layers:
            x = layer(x, tables, blocks, context=context)
        return self._norm(x)


class _BlockLayers:
    """Keys and values of context and blocks, as layers ask for them."""

    def __init__(self, kv: BlockKv, num_context: int) -> None:
        self._kv, self._num_context = kv, num_context
        self._new = torch.empty(0), torch.empty(0)

    def store(self, shape: AttentionShape, keys: Tensor, values: Tensor) -> None:
        """Take K and V [context and rows, num_kv_heads, head_dim]; attention stores them."""
        self._new = keys.transpose(0, 1), values.transpose(0, 1)

    def attend(self, shape: AttentionShape, heads: Tensor) -> Tensor:
        """Attend from the blocks' rows of [context and rows, heads, dim]; return [rows, heads * dim]."""
        queries = heads[self._num_context :, : shape.num_heads].transpose(0, 1)
        attended = self._kv.attend(shape.layer, queries, *self._new, shape.scaling)
        return attended.transpose(0, 1).flatten(1)

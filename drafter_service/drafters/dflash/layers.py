"""DFlash's decoder layers: a block of queries over the context's keys and values and the block's own.

The layers are those of transformers' `muse_glimmer_assistant`, the DFlash model of that library; the caller
decides where the context's keys and values are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, MuseGlimmerAssistantModel

ATTENTION_NAME = "specdec_block"
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class LayerMask:
    """Which keys of the context and of its own block a query of a layer sees."""

    reach: int | None = None
    """How far back a query sees from its own position, that key included; None: all the way."""
    ahead: int | None = None
    """How far ahead a query sees within its block; 0: it is causal; None: to the block's end."""

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Return which keys each query sees [num_queries, num_keys], by position; None: all of them."""
        seen = None
        if self.reach is not None:
            seen = queries[:, None] - keys <= self.reach
        if self.ahead is not None:
            near = keys - queries[:, None] <= self.ahead
            seen = near if seen is None else seen & near
        return seen

    def stop(self, position: int, block_stop: int) -> int:
        """Return the position after the last key that the query at a position sees."""
        return block_stop if self.ahead is None else min(position + self.ahead + 1, block_stop)


class BlockKv(Protocol):
    """Keys and values of the sessions or sequences of a pass."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attend from the blocks' rows; the result has the shape of `queries`.

        Args:
            queries: [num_heads, num_rows, head_dim]
            keys: keys of the new context and of the blocks [num_kv_heads, num_context + num_rows, head_dim].
            values: values of the same, in the same shape.
        """


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    block_kv: BlockKv,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers calls it: from query [1, heads, rows, dim] to output [1, rows, heads, dim]."""
    output = block_kv.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return output.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)


class BlockLayers:
    """A draft pass without context projection and head.

    Args:
        model: the model whose layers run; its attention is replaced and its context projection removed.
    """

    def __init__(self, model: MuseGlimmerAssistantModel) -> None:
        self.model: Any = model
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.model.encoder = nn.Identity()

    def __call__(
        self, context: Tensor, embeddings: Tensor, context_positions: Tensor, positions: Tensor, kv: BlockKv
    ) -> Tensor:
        """Return the states that the head reads [num_rows, hidden_size].

        Args:
            context: the new projected features of the target [num_context, hidden_size].
            embeddings: embeddings of anchors and masks [num_rows, hidden_size], block after block.
            context_positions: positions of the context [num_context].
            positions: positions of the blocks' rows [num_rows].
            kv: keeps keys and values, and attends over them.
        """
        output = self.model(
            noise_embeds=embeddings[None],
            context_hidden_states=context[None],
            position_ids=torch.cat([context_positions, positions])[None],
            attention_mask=dict.fromkeys(_LAYER_TYPES),
            block_kv=kv,
        )
        states: Tensor = output.last_hidden_state[0]
        return states

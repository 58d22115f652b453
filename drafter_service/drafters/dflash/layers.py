"""DFlash's decoder layers: a block of queries over the context's keys and values and the block's own.

Runs the layers of transformers' `muse_glimmer_assistant`, the DFlash model of that library; where the
context's keys and values are kept is the caller's affair.
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
    """What of the context and of its block a query of a layer sees."""

    reach: int | None = None
    """How far back from its own position, that key included; None: all."""
    is_causal: bool = False
    """Whether keys of the block that come later are hidden from it."""

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Which keys each query sees [num_queries, num_keys], by their positions; None: all of them."""
        seen = None
        if self.reach is not None:
            seen = queries[:, None] - keys <= self.reach
        if self.is_causal:
            causal = keys <= queries[:, None]
            seen = causal if seen is None else seen & causal
        return seen


class BlockKv(Protocol):
    """Keys and values of the sessions or sequences of a pass."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention of the blocks' rows; the same shape as `queries`.

        Args:
            queries: [num_heads, num_rows, head_dim]
            keys: [num_kv_heads, num_context + num_rows, head_dim], of the new context and of the blocks.
            values: the same.
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
    """An attention function of transformers: query [1, heads, rows, dim] to [1, rows, heads, dim]."""
    output = block_kv.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return output.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)


class BlockLayers:
    """A draft pass but for context projection and head.

    Args:
        model: its attention is replaced, its context projection taken away.
    """

    def __init__(self, model: MuseGlimmerAssistantModel) -> None:
        self.model: Any = model
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.model.encoder = nn.Identity()

    def __call__(
        self, context: Tensor, embeddings: Tensor, context_positions: Tensor, positions: Tensor, kv: BlockKv
    ) -> Tensor:
        """States [num_rows, hidden_size] that the head reads.

        Args:
            context: projected features of the target that are new [num_context, hidden_size].
            embeddings: of anchors and masks [num_rows, hidden_size], block after block.
            context_positions: [num_context]
            positions: [num_rows]
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

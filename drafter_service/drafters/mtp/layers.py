"""Gemma 4 assistants: decoder layers with queries only, over keys and values that are the target's.

Runs the layers of transformers' own classes (`gemma4_assistant`, `gemma4_unified_assistant`); where keys and
values come from is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "specdec_target_kv"


class TargetKv(Protocol):
    """Keys and values of one attention type, for the rows of a step."""

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attention of queries [num_heads, num_rows, head_dim]; the same shape.

        Args:
            sliding_window: keys further back than this from a query's position are not seen; None: all are.
        """


class _KvReference:
    """Stands for a tensor in the layers' code, which moves it to its device and hands it on."""

    def __init__(self, kv: TargetKv) -> None:
        self.kv = kv

    def to(self, *_: Any, **__: Any) -> _KvReference:
        return self


def _attention(
    module: nn.Module,
    query: Tensor,
    key: _KvReference,
    value: _KvReference,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [1, heads, rows, dim] to [1, rows, heads, dim]."""
    return key.kv.attend(query[0], scaling, sliding_window).transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)


class AssistantLayers:
    """A draft step but for the head.

    Args:
        model: a Gemma4AssistantForCausalLM or Gemma4UnifiedAssistantForCausalLM; its attention is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.attention_types: tuple[str, ...] = tuple(sorted(set(model.config.get_text_config().layer_types)))

    def step(
        self, embeddings: Tensor, hidden: Tensor, positions: Tensor, kv: Mapping[str, TargetKv]
    ) -> tuple[Tensor, Tensor]:
        """One step for rows of any number of sessions.

        Args:
            embeddings: of each row's last token, the target's [num_rows, backbone_hidden_size].
            hidden: the target's last hidden state, or what the step before returned
                [num_rows, backbone_hidden_size].
            positions: [num_rows].
            kv: by attention type.

        Returns:
            What the head reads [num_rows, hidden_size], and the hidden state of the next step
            [num_rows, backbone_hidden_size].
        """
        inputs = self.model.pre_projection(torch.cat([embeddings, hidden], dim=-1))
        references = {kind: (_KvReference(kv[kind]),) * 2 for kind in self.attention_types}
        output = self.model.model(
            inputs_embeds=inputs[None],
            position_ids=positions[None],
            attention_mask=dict.fromkeys(self.attention_types),
            shared_kv_states=references,
            use_cache=False,
        )
        states = output.last_hidden_state[0]
        return states, self.model.post_projection(states)

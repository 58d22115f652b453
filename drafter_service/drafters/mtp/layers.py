"""Gemma 4 assistants: decoder layers with queries only, over keys and values that are the target's.

The layers are those of transformers' own classes (`gemma4_assistant`, `gemma4_unified_assistant`); the caller
supplies keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "specdec_target_kv"


class TargetKv(Protocol):
    """Keys and values of one attention type, for the rows of a step."""

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attend from queries [num_heads, num_rows, head_dim]; the result has the same shape.

        Args:
            sliding_window: how far back a query sees from its position; None: all the way.
        """


class _KvReference:
    """A stand-in for a tensor in the layers' code, which moves it to its device and hands it on."""

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
    """Attend as transformers calls it: from query [1, heads, rows, dim] to output [1, rows, heads, dim]."""
    return key.kv.attend(query[0], scaling, sliding_window).transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)


class AssistantLayers:
    """A draft step without the head.

    Args:
        model: a Gemma4AssistantForCausalLM or Gemma4UnifiedAssistantForCausalLM; its attention is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.attention_types: tuple[str, ...] = tuple(sorted(set(model.config.get_text_config().layer_types)))

    def step(
        self,
        embeddings: Tensor,
        hidden: Tensor,
        positions: Tensor | Sequence[int],
        kv: Mapping[str, TargetKv],
    ) -> tuple[Tensor, Tensor]:
        """Take one step for rows of any number of sessions.

        Args:
            embeddings: the target's embedding of each row's last token [num_rows, backbone_hidden_size].
            hidden: the target's last hidden state, or what the step before returned
                [num_rows, backbone_hidden_size].
            positions: positions of the rows [num_rows].
            kv: the target's keys and values by attention type.

        Returns:
            What the head reads [num_rows, hidden_size], and the hidden state of the next step
            [num_rows, backbone_hidden_size].
        """
        inputs = self.model.pre_projection(torch.cat([embeddings, hidden], dim=-1))
        references = {kind: (_KvReference(kv[kind]),) * 2 for kind in self.attention_types}
        output = self.model.model(
            inputs_embeds=inputs[None],
            position_ids=torch.as_tensor(positions, device=inputs.device)[None],
            attention_mask=dict.fromkeys(self.attention_types),
            shared_kv_states=references,
            use_cache=False,
        )
        states = output.last_hidden_state[0]
        return states, self.model.post_projection(states)

"""An MTP draft in the making, and the target's keys and values that its steps read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drafter_service.drafters.base import Confidence, DraftSession
from drafter_service.drafters.growing import GrowingTree
from specdec.runtime.picks import PickContext


@dataclass(slots=True, eq=False)
class AssistantRound:
    """One session's draft in the making."""

    session: DraftSession
    num_wanted: int
    kv: Mapping[str, tuple[Tensor, Tensor]]
    """The target's keys and values [length, num_kv_heads, head_dim], by attention type."""
    hidden: Tensor  # [1, backbone_hidden_size]
    tree: GrowingTree | None = None
    """The draft where a tree is wanted."""
    draft: list[int] = field(default_factory=list)
    confidence: Confidence = field(init=False)
    """Decides where a chain ends."""

    def __post_init__(self) -> None:
        self.confidence = self.session.confidence()

    @property
    def last_token(self) -> int:
        """The token that the next step reads."""
        return self.draft[-1] if self.draft else self.session.token_ids[-1]

    def context(self, path: Sequence[int]) -> PickContext:
        """Return what the pick after a path of draft tokens depends on."""
        return PickContext(
            self.session.sampling, [*self.session.token_ids, *path], self.session.prompt_length
        )


@dataclass(frozen=True, slots=True, eq=False)
class SessionKv:
    """Committed keys and values of one attention type, session by session."""

    kv: Sequence[tuple[Tensor, Tensor]]  # per session [length, num_kv_heads, head_dim]
    counts: Sequence[int]
    """Rows of queries of each session."""

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attend from queries [num_heads, num_rows, head_dim], over views of the target's memory."""
        # As transformers masks it: the window reaches back from the last committed key, that one included.
        first = 0 if sliding_window is None else -sliding_window - 1
        rows = []
        for (keys, values), own in zip(self.kv, queries.split(list(self.counts), dim=1), strict=True):
            # Rows of a session, and heads that share keys, are queries of one attention.
            folded = own.reshape(1, keys.shape[1], -1, queries.shape[-1])
            attended = scaled_dot_product_attention(
                folded,
                keys[first:].transpose(0, 1)[None],
                values[first:].transpose(0, 1)[None],
                scale=scaling,
            )
            rows.append(attended.reshape(*own.shape[:2], -1))
        return torch.cat(rows, dim=1)

"""An MTP draft in the making, and the target's keys and values that its steps read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from drafter_service.drafters.base import Confidence, DraftSession
from drafter_service.drafters.growing import GrowingTree
from specdec.runtime.picks import PickContext
from specdec.state.weights import TargetWeights

_MOST_PADDED = 1 << 15
"""Most tokens of all sessions together, the filled-up ones included, whose keys and values are copied side by
side for a round's steps: for longer texts the copy takes longer than attending session by session."""


@dataclass(slots=True, eq=False)
class AssistantRound:
    """One session's draft in the making."""

    session: DraftSession
    num_wanted: int
    kv: Mapping[str, tuple[Tensor, Tensor]]
    """The target's keys and values [length, num_kv_heads, head_dim], by attention type: of all positions, or
    of the last ones, which are all that the target keeps in layers with a sliding window."""
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


class PaddedKv:
    """The same for several sessions in one call: copies side by side, filled up to the longest.

    Args:
        keys, values: [sessions, num_kv_heads, longest, head_dim].
        lengths: committed positions of each session.
        counts: rows of queries of each session.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, counts: Sequence[int]) -> None:
        self._keys, self._values, self._lengths = keys, values, lengths
        device, num_rows = keys.device, torch.tensor(counts)
        first = num_rows.cumsum(0) - num_rows
        place = torch.arange(max(counts))
        self._taken = (first[:, None] + place.minimum(num_rows[:, None] - 1)).to(device)
        """Which row of queries is at each place [sessions, places]; the last one fills up."""
        self._kept = (place < num_rows[:, None]).ravel().nonzero()[:, 0].to(device)
        """The places that do not only fill up, in the order of the rows."""
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attend from queries [num_heads, num_rows, head_dim], over the copies."""
        num_sessions, num_kv_heads = self._keys.shape[:2]
        rows = queries[:, self._taken].transpose(0, 1)  # [sessions, num_heads, places, head_dim]
        attended = scaled_dot_product_attention(
            rows.reshape(num_sessions, num_kv_heads, -1, rows.shape[-1]),
            self._keys,
            self._values,
            attn_mask=self._mask(sliding_window),
            scale=scaling,
        )
        return attended.reshape(rows.shape).transpose(0, 1).flatten(1, 2).index_select(1, self._kept)

    def _mask(self, sliding_window: int | None) -> Tensor:
        """What is added to scores [sessions, 1, 1, longest]; see `SessionKv` for the window."""
        if sliding_window not in self._masks:
            back = self._lengths[:, None] - torch.arange(self._keys.shape[2], device=self._keys.device)
            hidden = back <= 0
            if sliding_window is not None:
                hidden |= back > sliding_window + 1
            mask = torch.zeros_like(hidden, dtype=self._keys.dtype).masked_fill_(hidden, float("-inf"))
            self._masks[sliding_window] = mask[:, None, None]
        return self._masks[sliding_window]


class RoundKv:
    """Keys and values of one attention type for all steps of a round, in which sessions stop one by one.

    Args:
        kv: of each session [length, num_kv_heads, head_dim].
    """

    def __init__(self, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._kv = kv
        lengths = [len(keys) for keys, _ in kv]
        self._is_padded = len(kv) > 1 and len(kv) * max(lengths) <= _MOST_PADDED
        if self._is_padded:
            keys, values = (pad_sequence(list(part), batch_first=True) for part in zip(*kv, strict=True))
            self._keys, self._values = keys.transpose(1, 2), values.transpose(1, 2)
            self._lengths = torch.tensor(lengths, device=keys.device)
        self._last: tuple[Sequence[int], Sequence[int], SessionKv | PaddedKv] | None = None

    def of(self, sessions: Sequence[int], counts: Sequence[int]) -> SessionKv | PaddedKv:
        """Return what a step reads.

        Args:
            sessions: who takes the step, as places in `kv`, ascending.
            counts: rows of queries of each.
        """
        if self._last is None or self._last[:2] != (sessions, counts):
            self._last = sessions, counts, self._select(sessions, counts)
        return self._last[2]

    def _select(self, sessions: Sequence[int], counts: Sequence[int]) -> SessionKv | PaddedKv:
        if not self._is_padded or len(sessions) == 1:
            return SessionKv([self._kv[place] for place in sessions], counts)
        parts = self._keys, self._values, self._lengths
        if len(sessions) == len(self._kv):
            return PaddedKv(*parts, counts)
        places = torch.tensor(sessions, device=self._lengths.device)
        keys, values, lengths = (part.index_select(0, places) for part in parts)
        return PaddedKv(keys, values, lengths, counts)


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """Drafts of one target's sessions that take their steps together."""

    rounds: Sequence[AssistantRound]
    weights: TargetWeights
    kv: Mapping[str, RoundKv]
    """What the steps read, by attention type."""

    @classmethod
    def of(cls, rounds: Sequence[AssistantRound], weights: TargetWeights) -> SideBySide:
        """Return them as a group, of at least one."""
        return cls(
            rounds, weights, {kind: RoundKv([part.kv[kind] for part in rounds]) for kind in rounds[0].kv}
        )

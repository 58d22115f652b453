"""What all methods train on: anchors in packed sequences, and the frozen head of the target."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear

from drafter_service.drafters.head import DRAFT_VOCAB_FILE
from drafter_service.training.features import SequenceFeatures
from drafter_service.training.losses import HeadLoss, Loss, Taught
from specdec.runtime.decoder.layers import softcapped
from specdec.runtime.picks import arg_max
from specdec.state.weights import TargetWeights

_EVEN_ROWS = 64


def even_rows(num_wanted: int, num_there: int) -> int:
    """Return about `num_wanted` rows, at most `num_there`: a multiple of 64 where there are that many.

    On a CPU a matrix product with a new number of rows needs new kernels; making them takes longer than most
    products of a step.
    """
    num_rows = -(-num_wanted // _EVEN_ROWS) * _EVEN_ROWS
    if num_rows <= num_there:
        return num_rows
    return num_there // _EVEN_ROWS * _EVEN_ROWS or num_there


class Anchors(NamedTuple):
    """Positions to draft from in a packed batch; an anchor's token is committed, its state is not."""

    sequence: Tensor  # [num_anchors] index of the sequence, ascending
    position: Tensor  # [num_anchors] index in the sequence
    row: Tensor  # [num_anchors] index in the packed batch

    def take(self, index: Tensor) -> Anchors:
        """Return the anchors at some indices."""
        return Anchors(*(part[index] for part in self))


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Sequences one after the other, as the rows of one batch."""

    features: Sequence[SequenceFeatures]
    token_ids: Tensor  # [num_rows]
    last_hidden: Tensor  # [num_rows, hidden_size]
    anchors: Anchors

    @classmethod
    def of(cls, features: Sequence[SequenceFeatures]) -> PackedBatch:
        """Pack sequences. Every token of an answer is an anchor but the last, which nothing follows."""
        lengths = [len(item.token_ids) for item in features]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        positions = [
            torch.arange(item.prompt_length, length - 1, device=item.token_ids.device)
            for item, length in zip(features, lengths, strict=True)
        ]
        anchors = Anchors(
            torch.cat([torch.full_like(p, index) for index, p in enumerate(positions)]),
            torch.cat(positions),
            torch.cat([p + start for p, start in zip(positions, starts, strict=True)]),
        )
        return cls(
            features,
            torch.cat([item.token_ids for item in features]),
            torch.cat([item.last_hidden for item in features]),
            anchors,
        )

    @property
    def lengths(self) -> Tensor:
        """Number of tokens in each sequence [num_sequences]."""
        return torch.tensor([len(item.token_ids) for item in self.features], device=self.token_ids.device)

    def has_token(self, anchors: Anchors, distance: int) -> Tensor:
        """Return which anchors have a token `distance` further on [num_anchors]."""
        return anchors.position + distance < self.lengths[anchors.sequence]


class FrozenHead:
    """The rows of the target's head for the tokens a drafter can propose; target and drafter share them.

    Args:
        draft_vocab: ascending token ids [draft_vocab_size].
    """

    def __init__(self, weights: TargetWeights, draft_vocab: Tensor) -> None:
        device = weights.lm_head.device
        self.draft_vocab = draft_vocab.to(device)
        self._rows = weights.lm_head[self.draft_vocab].clone()
        self._softcap = weights.final_logit_softcap
        self._index = torch.full((len(weights.lm_head),), -1, device=device)
        self._index[self.draft_vocab] = torch.arange(len(draft_vocab), device=device)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [..., draft_vocab_size] of states [..., hidden_size]."""
        return softcapped(linear(states.to(self._rows.dtype), self._rows), self._softcap)

    def teach(self, states: Tensor, last_hidden: Tensor, token_ids: Tensor, loss: Loss) -> Taught:
        """Compare drafts with the target; the losses go back to the states.

        Args:
            states: what the head reads of the drafter [num_rows, hidden_size].
            last_hidden: what it reads of the target at the same places [num_rows, hidden_size].
            token_ids: the target's own tokens there [num_rows].
        """
        losses, right = HeadLoss.apply(
            states, last_hidden, self._index[token_ids], self.logits, self._back, loss
        )
        return Taught(losses, right)

    def _back(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient by states [num_rows, hidden_size] of that by logits."""
        if self._softcap:
            gradient = gradient * (1.0 - (logits / self._softcap).square())
        return gradient.to(self._rows.dtype) @ self._rows

    def is_right(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Return whether these tokens have the best logits of their rows [num_rows].

        Args:
            logits: [num_rows, draft_vocab_size].
            token_ids: [num_rows].
        """
        return arg_max(logits) == self._index[token_ids]

    def identity(self) -> dict[str, Any]:
        """Describe the draft vocabulary in plain values, which tell heads apart."""
        checksum = hashlib.blake2b(self.draft_vocab.cpu().numpy().tobytes(), digest_size=16)
        return {
            "draft_vocab_size": len(self.draft_vocab),
            "draft_vocab": checksum.hexdigest(),
            "dtype": str(self._rows.dtype),
        }

    def save(self, folder: Path) -> None:
        """Write the draft vocabulary."""
        token_ids = self.draft_vocab.to("cpu", torch.int32)
        save_file({"token_ids": token_ids}, folder / DRAFT_VOCAB_FILE)

"""What the methods train on alike: anchors in packed sequences, and the frozen head of the target."""

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
from specdec.runtime.picks import arg_max
from specdec.state.weights import TargetWeights, softcapped

_EVEN_ROWS = 64


def even_rows(num_wanted: int, num_there: int) -> int:
    """About `num_wanted` rows, of at most `num_there`: a multiple of 64 where there are as many.

    On a CPU the kernels of a matrix product are made anew for each number of rows that they have not seen,
    which takes longer than most products of a step.
    """
    num_rows = -(-num_wanted // _EVEN_ROWS) * _EVEN_ROWS
    if num_rows <= num_there:
        return num_rows
    return num_there // _EVEN_ROWS * _EVEN_ROWS or num_there


class Anchors(NamedTuple):
    """Positions to draft from in a packed batch; the token of an anchor is committed, its state is not."""

    sequence: Tensor  # [num_anchors] index of the sequence, ascending
    position: Tensor  # [num_anchors] index in the sequence
    row: Tensor  # [num_anchors] index in the packed batch

    def take(self, index: Tensor) -> Anchors:
        """Some of them."""
        return Anchors(*(part[index] for part in self))


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Sequences side by side."""

    features: Sequence[SequenceFeatures]
    token_ids: Tensor  # [num_rows]
    last_hidden: Tensor  # [num_rows, hidden_size]
    anchors: Anchors

    @classmethod
    def of(cls, features: Sequence[SequenceFeatures]) -> PackedBatch:
        """Anchors are the tokens of the answers but the last, which nothing follows."""
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
        """Tokens of each sequence [num_sequences]."""
        return torch.tensor([len(item.token_ids) for item in self.features], device=self.token_ids.device)

    def has_token(self, anchors: Anchors, distance: int) -> Tensor:
        """Which anchors [num_anchors] have a token `distance` further on."""
        return anchors.position + distance < self.lengths[anchors.sequence]


class FrozenHead:
    """The rows of the target's head that a drafter can propose, as target and drafter share them.

    Args:
        draft_vocab: [draft_vocab_size] ascending token ids.
    """

    def __init__(self, weights: TargetWeights, draft_vocab: Tensor) -> None:
        device = weights.lm_head.device
        self.draft_vocab = draft_vocab.to(device)
        self._rows = weights.lm_head[self.draft_vocab].clone()
        self._softcap = weights.final_logit_softcap
        self._index = torch.full((len(weights.lm_head),), -1, device=device)
        self._index[self.draft_vocab] = torch.arange(len(draft_vocab), device=device)

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., draft_vocab_size] of states [..., hidden_size]."""
        return softcapped(linear(states.to(self._rows.dtype), self._rows), self._softcap)

    @torch.no_grad()
    def target(self, last_hidden: Tensor) -> Tensor:
        """The target's distribution [..., draft_vocab_size] after its last hidden states, fp32."""
        return self.logits(last_hidden).float().softmax(-1)

    def is_right(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Whether the best of logits [num_rows, draft_vocab_size] are these tokens [num_rows]."""
        return arg_max(logits) == self._index[token_ids]

    def identity(self) -> dict[str, Any]:
        """What says whose head it is: the vocabulary, in plain values."""
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

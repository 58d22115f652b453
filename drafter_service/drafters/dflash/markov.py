"""The links of the DFlash drafters that are trained here: a small head that corrects states.

A state is corrected by the embedding of the token before it, so the head learns little about many tokens from
few, and needs no table of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from drafter_service.drafters.dflash.links import LinkedPlaces, Places
from drafter_service.drafters.head import DraftHead
from specdec.runtime.kernels import layer as kernels
from specdec.state.weights import TargetWeights

PREFIX = "markov."
"""Prefix of the head's weights in a checkpoint; checkpoints from elsewhere have no such weights."""


class MarkovHead(nn.Module):
    """Two layers over a state and the embedding of the token before it; untrained, they change nothing.

    Args:
        rank: width between the layers.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.state = nn.Linear(hidden_size, rank, bias=False)
        self.token = nn.Linear(hidden_size, rank, bias=False)
        self.out = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], hidden_size: int) -> MarkovHead:
        """Make the head of the weights of a checkpoint, in their dtype and on their device.

        Raises:
            KeyError, RuntimeError, TypeError: the weights are not those of such a head.
        """
        head = cls(hidden_size, len(weights["state.weight"])).to(weights["state.weight"])
        head.load_state_dict(dict(weights))
        return head.requires_grad_(False)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return what the LM head reads [num_rows, hidden_size].

        Args:
            states: states of the places, as the decoder returns them [num_rows, hidden_size].
            embeddings: embeddings of the tokens before them, in any scale [num_rows, hidden_size].
        """
        return states + self.correction(self.prepared(states), embeddings)

    def prepared(self, states: Tensor) -> Tensor:
        """Return the part that does not depend on the token before [num_rows, rank]."""
        prepared: Tensor = self.state(_normed(states))
        return prepared

    def correction(self, prepared: Tensor, embeddings: Tensor) -> Tensor:
        """Return what is added to the states [num_rows, hidden_size]."""
        token: Tensor = self.token(_normed(embeddings))
        corrected: Tensor = self.out(silu(prepared + token))
        return corrected

    def walk(self, places: Places, head: DraftHead, weights: TargetWeights) -> MarkovWalk:
        """Prepare the part that does not depend on the tokens before; see `Links`."""
        return MarkovWalk(self, places.states, self.prepared(places.states), head, weights)


@dataclass(frozen=True, slots=True, eq=False)
class MarkovWalk:
    """A walk that corrects the state of each place before the LM head reads it."""

    markov: MarkovHead
    states: Tensor
    prepared: Tensor
    head: DraftHead
    weights: TargetWeights

    def begin(self) -> None:
        """Return nothing: a place depends on one token only."""

    def follow(self, rows: Tensor, before: Tensor, memory: Tensor | None) -> LinkedPlaces:
        """Say what may follow tokens; see `Walk`."""
        embeddings = self.weights.embed(before).to(self.states.dtype)
        states = self.states[rows] + self.markov.correction(self.prepared[rows], embeddings)
        return LinkedPlaces(self.head.logits(states, self.weights))


def _normed(x: Tensor) -> Tensor:
    """Return the norm of rows [num_rows, size], as torch computes it without an epsilon of ours."""
    if kernels.takes(x) and not torch.is_grad_enabled():
        return kernels.norm(x, None, torch.finfo(torch.float32).eps)
    return rms_norm(x, x.shape[-1:])

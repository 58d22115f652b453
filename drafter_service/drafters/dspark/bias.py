"""The links of DSpark: a low-rank bias of a place's logits by the token before it, and a confidence.

There are three kinds of bias. "vanilla" depends on the token alone. "gated" lets the place's state decide how
much of each component counts. "rnn" keeps a memory of the block's tokens. A confidence is the probability
that a draft is accepted if those before it are; it is known before the draft is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from drafter_service.drafters.dflash.links import LinkedPlaces, Places
from drafter_service.drafters.head import DraftHead
from specdec.runtime.decoder.layers import Linear
from specdec.runtime.prepack import multiplier
from specdec.state.weights import TargetWeights

KINDS = {"vanilla": "", "gated": "gate_proj", "rnn": "joint_proj"}
"""Kinds of bias, and the weight that each has beside the tables."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBias:
    """A bias of logits by the token before."""

    kind: str
    tokens: Tensor  # [vocab_size, rank]
    to_logits: Linear
    """From [rows, rank] to [rows, draft_vocab_size]."""
    inner: Linear | None
    """The gate's, or the memory's, projection of a state and what is known of the token."""
    confidence: Linear | None
    """From a state, and the token's row if `confidence_reads_token`, to [rows, 1]; None: nothing is said."""
    confidence_reads_token: bool

    @classmethod
    def of(
        cls,
        kind: str,
        weights: Mapping[str, Tensor],
        confidence: Mapping[str, Tensor],
        sizes: tuple[int, int],
        draft_order: Tensor | None,
    ) -> TokenBias:
        """Make it of a checkpoint's weights.

        Args:
            kind: a key of KINDS.
            confidence: weights of the confidence head; empty: there is none.
            sizes: rank, and elements of a state.
            draft_order: rows of the draft vocabulary in order of token ids; None: they are.

        Raises:
            KeyError, ValueError: weights are missing or do not fit.
        """
        rank, hidden_size = sizes
        tokens, rows = weights["markov_w1.weight"], weights["markov_w2.weight"]
        widths = {"gated": (rank, hidden_size + rank), "rnn": (3 * rank, 2 * rank + hidden_size)}
        inner = weights[f"{KINDS[kind]}.weight"] if KINDS[kind] else None
        if {tokens.shape[1], rows.shape[1]} != {rank} or (inner is not None and inner.shape != widths[kind]):
            raise ValueError(
                f"the tables are {[*tokens.shape]} and {[*rows.shape]}, the {kind} bias has a projection of "
                f"{None if inner is None else [*inner.shape]}, and markov_rank is {rank}"
            )
        if draft_order is not None and len(draft_order) != len(rows):
            raise ValueError(f"markov_w2 has {len(rows)} rows for a head of {len(draft_order)}")
        for name, owner in ((f"{KINDS[kind]}.bias", weights), ("proj.bias", confidence)):
            weight = owner.get(name.replace(".bias", ".weight"))
            if weight is not None and owner[name].shape != weight.shape[:1]:
                raise ValueError(f"{name} is {[*owner[name].shape]}")
        says = confidence.get("proj.weight")
        if says is not None and says.shape not in ((1, hidden_size), (1, hidden_size + rank)):
            raise ValueError(f"the confidence head is {[*says.shape]}")
        return cls(
            kind,
            tokens,
            multiplier(rows if draft_order is None else rows[draft_order]),
            None if inner is None else multiplier(inner, weights[f"{KINDS[kind]}.bias"]),
            None if says is None else multiplier(says, confidence["proj.bias"]),
            says is not None and says.shape[1] > hidden_size,
        )

    def walk(self, places: Places, head: DraftHead, weights: TargetWeights) -> BiasWalk:
        """Compute the logits without a bias; see `Links`."""
        return BiasWalk(self, places, head.logits(places.states, weights))

    def biased(self, states: Tensor, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the bias's components [rows, rank], and what is remembered from there on [rows, rank].

        Args:
            states: of the places [rows, hidden_size].
            tokens: rows of the tokens before them [rows, rank].
            memory: what was remembered before [rows, rank].
        """
        if self.inner is None:
            return tokens, None
        if memory is None:
            return torch.sigmoid(self.inner(torch.cat([states, tokens], dim=-1))) * tokens, None
        gate, candidate, output = self.inner(torch.cat([memory, tokens, states], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * memory + (1 - gate) * torch.tanh(candidate)


@dataclass(frozen=True, slots=True, eq=False)
class BiasWalk:
    """A walk that adds biases to logits."""

    bias: TokenBias
    places: Places
    logits: Tensor  # [num_places, draft_vocab_size]

    def begin(self) -> Tensor | None:
        """Return the memory at each block's beginning, behind the anchor's place if that drafts nothing."""
        if self.bias.kind != "rnn":
            return None
        anchors, states = self.places.anchors, self.places.anchor_states
        memory = self.places.states.new_zeros(len(anchors), self.bias.tokens.shape[1])
        if states is None:
            return memory
        return self.bias.biased(states, embedding(anchors, self.bias.tokens), memory)[1]

    def follow(self, rows: Tensor, before: Tensor, memory: Tensor | None) -> LinkedPlaces:
        """Say what may follow tokens; see `Walk`."""
        bias, states = self.bias, self.places.states[rows]
        tokens = embedding(before, bias.tokens)
        components, memory = bias.biased(states, tokens, memory)
        confidence = None
        if bias.confidence is not None:
            read = torch.cat([states, tokens], dim=-1) if bias.confidence_reads_token else states
            confidence = torch.sigmoid(bias.confidence(read)[:, 0].float())
        return LinkedPlaces(self.logits[rows] + bias.to_logits(components), memory, confidence)

"""A drafter that reads target state and keeps copies of all it read, for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drafter_service.drafters.base import Drafter, DrafterInfo, DraftItem, DraftSession, OpenDraft
from drafter_service.drafters.ngram import NgramSession
from drafter_service.registry import FAMILIES, DrafterFactory
from specdec.runtime.target_view import Projection, TargetStateView
from specdec.target_state import TargetStateSpec, hidden_name, key_name, value_name


@dataclass
class Reading:
    """What a round saw: rows by tensor name, positions below `length`."""

    length: int
    tensors: dict[str, Tensor]


class ProbeSession(NgramSession):
    """Drafts by n-grams, so that rounds have drafts, some right and some wrong."""

    def __init__(self, request: OpenDraft) -> None:
        super().__init__(request, range(1, 3))
        self.readings: list[Reading] = []


@dataclass
class StateProbe(Drafter):
    """Reads everything its spec names, each round anew.

    `delay` of a subclass or a callback may be used to hold a round.
    """

    spec: TargetStateSpec
    projection: Projection | None = None
    needs_weights: bool = False
    sessions: list[ProbeSession] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.info = DrafterInfo(
            "probe", "probe", 8, 4, target_state_spec=self.spec, needs_target_weights=self.needs_weights
        )

    @property
    def families(self) -> Mapping[str, DrafterFactory]:
        """Drafter families with this one."""
        return {**FAMILIES, "probe": lambda spec, config: self}

    def open(self, request: OpenDraft) -> DraftSession:
        session = ProbeSession(request)
        self.sessions.append(session)
        return session

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        drafts = []
        for item in items:
            session = item.session
            assert isinstance(session, ProbeSession)
            assert session.view is not None
            session.readings.append(read_all(session.view))
            drafts.append(session.propose(item.num_draft_tokens))
        return drafts


def read_all(view: TargetStateView) -> Reading:
    """Copies of every tensor a drafter may read."""
    tensors: dict[str, Tensor] = {}
    if view.spec.projection:
        tensors["projected"] = view.projected().clone()
    else:
        tensors |= {hidden_name(layer): view.hidden(layer).clone() for layer in view.spec.hidden_layer_ids}
    if view.spec.last_hidden_state:
        tensors["last_hidden"] = view.last_hidden().clone()
    layers = set(view.spec.kv_layer_ids)
    if view.spec.kv_last_of_each_attention_type:
        layers |= {view.last_layer_of(kind) for kind in view.attention_types}
    for layer in sorted(layers):
        keys, values = view.kv(layer)
        tensors |= {key_name(layer): keys.clone(), value_name(layer): values.clone()}
    return Reading(view.length, tensors)


def random_projection(num_layers: int, hidden_size: int, output_size: int, dtype: torch.dtype) -> Projection:
    """A projection with random weights, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    fc = torch.randn(output_size, num_layers * hidden_size, generator=generator) * hidden_size**-0.5
    norm = torch.rand(output_size, generator=generator) + 0.5
    return Projection(fc.to(dtype), norm.to(dtype), 1e-6)

"""What drafters minimise: values and gradients against the formulas, written out with autograd."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from drafter_service.training.batch import FrozenHead
from drafter_service.training.config import LOSS_NAMES
from drafter_service.training.dflash import _drawn
from drafter_service.training.losses import LOSSES
from specdec.state.weights import TargetWeights

VOCAB, HIDDEN, ROWS = 40, 12, 300
DRAFT_VOCAB = torch.arange(0, VOCAB, 2)


def head(softcap: float = 0.0) -> FrozenHead:
    generator = torch.Generator().manual_seed(1)
    weights = SimpleNamespace(
        lm_head=torch.randn(VOCAB, HIDDEN, generator=generator), final_logit_softcap=softcap
    )
    return FrozenHead(cast(TargetWeights, weights), DRAFT_VOCAB)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return the drafter's states, the target's, and the target's tokens: half cannot be drafted."""
    generator = torch.Generator().manual_seed(2)
    states, target = (torch.randn(ROWS, HIDDEN, generator=generator) for _ in range(2))
    return states.requires_grad_(), target, torch.randint(VOCAB, (ROWS,), generator=generator)


def accepted(drafts: Tensor, target: Tensor) -> Tensor:
    return torch.minimum(drafts, target).sum(-1)


def far(drafts: Tensor, target: Tensor) -> Tensor:
    return -(target * drafts.log()).sum(-1)


def hybrid(drafts: Tensor, target: Tensor) -> Tensor:
    share = accepted(drafts, target)
    guard = (-3.0 * share.detach()).exp()
    return guard * far(drafts, target) + (1 - guard) * (1 - share)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": far,
    "tv": lambda drafts, target: 1 - accepted(drafts, target),
    "acceptance": lambda drafts, target: -accepted(drafts, target).log(),
    "lk": hybrid,
}


def of_formula(name: str, logits: Tensor, target: Tensor, token: Tensor) -> Tensor:
    drafts, wanted = logits.softmax(-1), target.softmax(-1).detach()
    if name == "ce":
        there = token % 2 == 0
        chosen = drafts[torch.arange(ROWS), token // 2].log()
        return torch.where(there, -chosen, torch.zeros(()))
    return FORMULAS[name](drafts, wanted)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_values_and_gradients_are_those_of_the_formula(name: str, softcap: float) -> None:
    frozen, (states, target, token) = head(softcap), rows()
    weights = torch.rand(ROWS)
    taught = frozen.teach(states, target, token, LOSSES[name])
    (found,) = torch.autograd.grad((taught.losses * weights).sum(), states)
    expected = of_formula(name, frozen.logits(states), frozen.logits(target), token)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), states)
    assert torch.allclose(taught.losses, expected, atol=1e-5)
    assert torch.allclose(found, gradient, atol=1e-5)
    assert gradient.abs().max() > 0.01
    best = frozen.draft_vocab[frozen.logits(states).argmax(-1)]
    assert taught.right.equal(best == token)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_the_targets_own_states_have_nothing_to_learn_but_by_tokens(name: str) -> None:
    """Where the drafter says what the target says, only its own tokens, which are sampled, pull it away."""
    frozen, (_, target, token) = head(), rows()
    states = target.clone().requires_grad_()
    taught = frozen.teach(states, target, token, LOSSES[name])
    (gradient,) = torch.autograd.grad(taught.losses.sum(), states)
    if name == "ce":
        assert gradient.abs().max() > 0.01
    else:
        assert gradient.abs().max() < 1e-5


def test_a_drafter_far_from_the_target_has_a_finite_loss() -> None:
    frozen, (states, target, token) = head(), rows()
    distant = (states.detach() * 200).requires_grad_()
    for name in LOSS_NAMES:
        taught: Any = frozen.teach(distant, target * 200, token, LOSSES[name])
        (gradient,) = torch.autograd.grad(taught.losses.sum(), distant)
        assert taught.losses.isfinite().all()
        assert gradient.isfinite().all()


def test_places_are_drawn_by_their_share() -> None:
    shares = torch.tensor([1.0, 0.6, 0.2, 0.0]).expand(1000, 4)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack(
        [torch.bincount(_drawn(shares, generator) % 4, minlength=4).float() / 1000 for _ in range(20)]
    ).mean(0)
    assert torch.allclose(drawn, shares[0], atol=0.03)
    few = torch.tensor([[1.0, 0.0], [0.4, 0.0]])
    for _ in range(20):
        assert set(_drawn(few, generator).tolist()) <= {0, 2}

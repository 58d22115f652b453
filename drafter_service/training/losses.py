"""What a drafter in training minimises: how far its distribution is from the target's, at each draft.

The head is the target's and stays as it is, so the gradient by what the head reads is all that is needed. It
is taken together with the loss, some rows at a time: their logits stay in the cache, and no logits of a whole
step are kept for the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drafter_service.training.config import LOSS_NAMES
from specdec.runtime.picks import arg_max

_ROWS = 128
"""Number of rows whose logits exist at a time."""
_GUARD = 3.0
"""How fast the guard of `lk` loses its weight as acceptance rises (arXiv 2602.23881, section 3)."""

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns the losses [num_rows] and their gradients by the logits [num_rows, draft_vocab_size].

Args: the drafter's and the target's distributions [num_rows, draft_vocab_size], and the index of the target's
own token in the draft vocabulary, -1 where it is not in it [num_rows].
"""


def kl(drafts: Tensor, target: Tensor, _token: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy against the target's distribution: the KL divergence and what no drafter can change."""
    return -(target * drafts.clamp_min(1e-30).log()).sum(-1), drafts - target


def ce(drafts: Tensor, _target: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy against the target's own token; a token that cannot be drafted teaches nothing."""
    there, rows = token >= 0, torch.arange(len(token), device=token.device)
    index = token.clamp_min(0)
    losses = -drafts[rows, index].clamp_min(1e-30).log()
    gradient = drafts.clone()
    gradient[rows, index] -= 1.0
    return losses * there, gradient * there[:, None]


def tv(drafts: Tensor, target: Tensor, _token: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation: the share of drafts that a target that samples rejects."""
    share = torch.minimum(drafts, target).sum(-1)
    return 1.0 - share, _towards_acceptance(drafts, target)


def acceptance(drafts: Tensor, target: Tensor, _token: Tensor) -> tuple[Tensor, Tensor]:
    """Negative logarithm of the share of drafts that are accepted (LK-alpha of arXiv 2602.23881)."""
    share = torch.minimum(drafts, target).sum(-1).clamp_min(1e-6)
    return -share.log(), _towards_acceptance(drafts, target) / share[:, None]


def lk(drafts: Tensor, target: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation, and KL divergence as a guard where little is accepted (LK-lambda, the same paper)."""
    (far, by_far), (rejected, by_rejected) = kl(drafts, target, token), tv(drafts, target, token)
    guard = (-_GUARD * (1.0 - rejected)).exp()
    losses = guard * far + (1.0 - guard) * rejected
    return losses, by_rejected + guard[:, None] * (by_far - by_rejected)


def _towards_acceptance(drafts: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of 1 - sum(min(drafts, target)) by the logits of the drafts."""
    missing = drafts * (drafts < target)
    return drafts * missing.sum(-1, keepdim=True) - missing


LOSSES: dict[str, Loss] = dict(zip(LOSS_NAMES, (kl, ce, tv, acceptance, lk), strict=True))


class Taught(NamedTuple):
    """What a step learned from rows."""

    losses: Tensor  # [num_rows] fp32
    right: Tensor  # [num_rows] whether the drafter's best token is the target's own


class HeadLoss(torch.autograd.Function):
    """The loss of rows that a frozen head reads, and its gradient by these rows."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        of_target: Tensor,
        token: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        back: Callable[[Tensor, Tensor], Tensor],
        loss: Loss,
    ) -> tuple[Tensor, Tensor]:
        """Return the losses and which rows are right.

        Args:
            states: what the head reads of the drafter [num_rows, hidden_size].
            of_target: what it reads of the target at the same places [num_rows, hidden_size].
            token: index of the target's own token in the draft vocabulary, or -1 [num_rows].
            logits_of: the head: states to logits.
            back: the head backwards: logits and the gradient by them to the gradient by states.
        """
        losses, right, gradients = [], [], []
        parts = zip(states.split(_ROWS), of_target.split(_ROWS), token.split(_ROWS), strict=True)
        for own, other, wanted in parts:
            logits = logits_of(own).float()
            target = logits_of(other).float().softmax(-1)
            values, gradient = loss(logits.softmax(-1), target, wanted)
            losses.append(values)
            right.append(arg_max(logits) == wanted)
            gradients.append(back(logits, gradient).to(states.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        is_right = torch.cat(right)
        ctx.mark_non_differentiable(is_right)
        return torch.cat(losses), is_right

    @staticmethod
    def backward(ctx: Any, *by_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient by the states; nothing else is trained."""
        (gradient,) = ctx.saved_tensors
        return gradient * by_output[0][:, None].to(gradient.dtype), None, None, None, None, None

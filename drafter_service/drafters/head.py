"""From the last states of a drafter to draft tokens: the LM head, and picks as the target makes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drafter_service.drafters.base import Confidence
from drafter_service.drafters.growing import Candidates
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.decoder.layers import softcapped
from specdec.runtime.picks import PickContext, Picker
from specdec.runtime.prepack import multiplier
from specdec.state.weights import TargetWeights

DRAFT_VOCAB_FILE = "draft_vocab.safetensors"
Logits = Callable[[Tensor], Tensor]
"""Maps states [num_rows, hidden_size] to logits [num_rows, draft_vocab_size]."""


def read_draft_vocab(folder: Path, vocab_size: int, device: torch.device) -> Tensor | None:
    """Read the token ids [draft_vocab_size] that a drafter's head covers, ascending; None: all.

    Raises:
        InvalidArgumentError: the file is damaged.
    """
    path = folder / DRAFT_VOCAB_FILE
    if not path.is_file():
        return None
    try:
        token_ids = load_file(path)["token_ids"].long()
    except (OSError, SafetensorError, KeyError) as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error!r}", field="drafter") from error
    ascending = token_ids.ndim == 1 and len(token_ids) and bool((token_ids.diff() > 0).all())
    if not (ascending and token_ids[0] >= 0 and token_ids[-1] < vocab_size):
        raise InvalidArgumentError(
            f"{path}: token_ids must be ascending ids below {vocab_size}.", field="drafter"
        )
    return token_ids.to(device)


class DraftHead:
    """The head of a drafter: its own, or that of the target its sessions follow.

    Args:
        draft_vocab: token ids [draft_vocab_size] of the head's rows, ascending; None: all.
        own: the drafter's own head; None: the target's is used.
        vocab_size: tokens the drafter knows; 0: as many as the target has.
        scale: factor of the logits of the target's head.
        softcap: softcap of the logits of the target's head, 0 for none; None: the target's own.
    """

    def __init__(
        self,
        draft_vocab: Tensor | None,
        own: Logits | None,
        dtype: torch.dtype,
        *,
        vocab_size: int = 0,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.draft_vocab = draft_vocab
        self.own = own
        self._dtype, self._scale, self._softcap = dtype, scale, softcap
        self._vocab_size = vocab_size
        self._least_size = vocab_size if draft_vocab is None else max(vocab_size, int(draft_vocab[-1]) + 1)
        self._heads: WeakKeyDictionary[TargetWeights, Logits] = WeakKeyDictionary()
        self._pickers: dict[int, Picker] = {}

    def vocab_size(self, weights: TargetWeights) -> int:
        """Count the tokens that drafter and target both know; a target's further rows are padding."""
        return self._vocab_size or min(len(weights.embedding), len(weights.lm_head))

    def misfit(self, weights: TargetWeights, least_size: int = 0) -> str:
        """Say how a target's vocabulary is too small for the drafter's; empty: it is not.

        Args:
            least_size: number of tokens the target must know in any case.
        """
        known, wanted = len(weights.embedding), max(self._least_size, least_size)
        if not self.own:
            known = min(known, len(weights.lm_head))
        if known < wanted:
            return f"its vocabulary has {wanted} tokens, the target's {known}"
        return ""

    def logits(self, states: Tensor, weights: TargetWeights) -> Tensor:
        """Return logits [num_rows, draft_vocab_size] of states [num_rows, hidden_size]."""
        if self.own:
            return self.own(states)
        if weights not in self._heads:
            self._heads[weights] = self._head_of(weights)
        return self._heads[weights](states)

    def _head_of(self, weights: TargetWeights) -> Logits:
        drafted = slice(self.vocab_size(weights)) if self.draft_vocab is None else self.draft_vocab
        rows = weights.lm_head[drafted]
        # The closures must not hold `weights`: the cache would keep them alive.
        multiply, scale = multiplier(rows.to(self._dtype)), self._scale
        cap = weights.final_logit_softcap if self._softcap is None else self._softcap
        if scale == 1.0:
            return lambda states: softcapped(multiply(states), cap)
        return lambda states: softcapped(multiply(states) * scale, cap)

    def pick(
        self,
        logits: Tensor,
        counts: Sequence[int],
        contexts: Sequence[PickContext],
        weights: TargetWeights,
    ) -> list[list[int]]:
        """Pick tokens as the target picks, from rows of several sessions.

        Args:
            logits: [sum(counts), draft_vocab_size].
            counts: number of rows of each session.
            contexts: what picks depend on, for each session.
            weights: weights of the target that the sessions follow.

        Returns:
            A token for each row, session by session.
        """
        picker = self._picker(self.vocab_size(weights), logits.device)
        return picker.pick(list(logits.split(list(counts))), contexts)

    def candidates(
        self,
        logits: Tensor,
        counts: Sequence[int],
        contexts: Sequence[PickContext],
        weights: TargetWeights,
        num_candidates: int,
    ) -> list[list[Candidates]]:
        """Return the likeliest picks of the target; the arguments are those of `pick`.

        Above temperature 0 they are in the order of the shared noise: by log draft_probs + gumbel(seed,
        position), whose softmax stands for the probability that a token is the pick.

        Returns:
            At most `num_candidates` (log probability, token id) pairs for each session and row, best first.
        """
        picker = self._picker(self.vocab_size(weights), logits.device)
        scores = picker.scores(list(logits.split(list(counts))), contexts)
        log_probs, columns = scores.log_softmax(-1).topk(min(num_candidates, scores.shape[-1]))
        token_ids = columns if self.draft_vocab is None else self.draft_vocab[columns]
        rows = [
            [pair for pair in zip(*row, strict=True) if pair[0] > -math.inf]
            for row in zip(log_probs.tolist(), token_ids.tolist(), strict=True)
        ]
        remaining = iter(rows)
        return [list(islice(remaining, count)) for count in counts]

    def _picker(self, vocab_size: int, device: torch.device) -> Picker:
        if vocab_size not in self._pickers:
            self._pickers[vocab_size] = Picker(vocab_size, device, self.draft_vocab)
        return self._pickers[vocab_size]

    def confidence(self, logits: Tensor, token_id: int) -> float:
        """Return the probability of a draft token by its row of logits [draft_vocab_size]."""
        index = token_id
        if self.draft_vocab is not None:
            index = int(torch.searchsorted(self.draft_vocab, token_id))
        return logits.float().softmax(-1)[index].item()

    def extend(self, draft: list[int], pick: int, logits: Tensor, confidence: Confidence) -> bool:
        """Append a pick to a draft, unless it is unlikely and not the first; return whether it was likely.

        Args:
            logits: the logits that the pick was made from [draft_vocab_size].
            confidence: decides by its probability what is likely.
        """
        is_sure = not confidence.matters or confidence.takes(self.confidence(logits, pick))
        if is_sure or not draft:
            draft.append(pick)
        return is_sure

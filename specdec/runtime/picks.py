"""From logits to picks: processors, truncation and the shared-noise arg max.

The pick at position t is `argmax(processed logits)` at temperature 0 and
`argmax(processed logits / temperature + gumbel(seed, t))` above it, which samples from the softmax of the
processed logits (the Gumbel-max trick). It depends on nothing but the logits, the tokens before t, the
parameters and t, so any drafter meets the same pick.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.contract.draft_tree import NO_DRAFT, DraftTree
from specdec.contract.sampling import SamplingParams
from specdec.runtime.noise import GumbelNoise

_TOP_P_CANDIDATES = 256
_ARG_MAX_BLOCK = 256


def arg_max(rows: Tensor) -> Tensor:
    """Index of each row's largest value, the first one's of several [num_rows].

    By blocks where they come out even: torch has vector instructions for maxima, none on a CPU for where they
    are (measured: 0.3 ms instead of 2.1 for 16 rows of 49152 bf16 values).
    """
    if rows.shape[-1] % _ARG_MAX_BLOCK:
        return rows.argmax(-1)
    blocks = rows.unflatten(-1, (-1, _ARG_MAX_BLOCK))  # [num_rows, num_blocks, block]
    best = blocks.amax(-1).argmax(-1)
    within = blocks[torch.arange(len(rows), device=rows.device), best].argmax(-1)
    found: Tensor = best * _ARG_MAX_BLOCK + within
    return found


@dataclass(frozen=True, slots=True)
class PickContext:
    """What the picks of one session's round may depend on besides the logits."""

    sampling: SamplingParams
    token_ids: Sequence[int]
    """All tokens before the first row's position: prompt and output."""
    prompt_length: int
    """How many of them are the prompt."""
    draft: DraftTree = NO_DRAFT
    """Row 0 follows none of its tokens, row i + 1 its token i and that one's ancestors."""

    def tokens_before(self, row: int) -> list[int]:
        """Return every token before the position a row picks for."""
        if self.draft.is_chain:
            return [*self.token_ids, *self.draft.token_ids[:row]]
        path = self.draft.path_to(row - 1)
        return [*self.token_ids, *(self.draft.token_ids[index] for index in path)]

    def positions(self, num_rows: int) -> Sequence[int]:
        """Return the position each of the first rows picks for: rows of a tree at one depth have the same."""
        first = len(self.token_ids)
        if self.draft.is_chain:
            return range(first, first + num_rows)
        return [first, *(first + depth for depth in self.draft.depths)][:num_rows]


class Picker:
    """Picks tokens. Keeps the noise generator's buffers: one per engine thread."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._noise = GumbelNoise(vocab_size, device)

    def pick(self, logits: Sequence[Tensor], contexts: Sequence[PickContext]) -> list[list[int]]:
        """Return the target's pick for every row of every session.

        Args:
            logits: per session [num_rows, vocab_size]; what each row follows is in its context.
            contexts: per session.

        Returns:
            Per session num_rows token ids.
        """
        plain = [index for index, context in enumerate(contexts) if context.sampling.is_plain]
        picks: list[list[int]] = [[] for _ in contexts]
        if plain:
            best = arg_max(torch.cat([logits[index] for index in plain])).tolist()
            for index in plain:
                picks[index], best = best[: len(logits[index])], best[len(logits[index]) :]
        for index, context in enumerate(contexts):
            if not context.sampling.is_plain:
                scores = self.scores(logits[index], context)
                picks[index] = arg_max(scores).tolist()
        return picks

    def scores(self, logits: Tensor, context: PickContext) -> Tensor:
        """Return processed and perturbed logits [num_rows, vocab_size], fp32, whose arg max is the pick."""
        sampling = context.sampling
        scores = logits.float()
        if scores is logits:
            scores = logits.clone()
        process_logits(scores, context)
        if sampling.is_greedy:
            return scores
        # Relative to the best: dividing by a temperature near 0 then cannot overflow to infinity.
        scores.sub_(scores.amax(-1, keepdim=True)).div_(sampling.temperature)
        truncate(scores, sampling)
        return scores.add_(self._noise_at(sampling.noise_seed, context.positions(len(scores))))

    def _noise_at(self, seed: int, positions: Sequence[int]) -> Tensor:
        """Return the noise [num_positions, vocab_size] of positions, valid until the next call. Some are
        equal.
        """
        if isinstance(positions, range):
            return self._noise(seed, positions)
        distinct = sorted(set(positions))
        rows = torch.tensor([distinct.index(position) for position in positions])
        noise = self._noise(seed, distinct)
        return noise.index_select(0, rows.to(noise.device))


def process_logits(logits: Tensor, context: PickContext) -> None:
    """Apply bias, allowed tokens and penalties in place to logits [num_rows, vocab_size], fp32."""
    sampling = context.sampling
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[:, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if sampling.allowed_token_ids:
        allowed = torch.tensor(sampling.allowed_token_ids, device=logits.device)
        kept = logits[:, allowed]
        logits.fill_(float("-inf"))
        logits[:, allowed] = kept
    if sampling.has_penalties:
        for row in range(len(logits)):
            _penalise(logits[row], context.tokens_before(row), context.prompt_length, sampling)


def _penalise(logits: Tensor, tokens: list[int], prompt_length: int, sampling: SamplingParams) -> None:
    """Apply penalties to one row [vocab_size], in place."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = Counter(tokens[prompt_length:])
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(output), device=logits.device)
        counts = torch.tensor(list(output.values()), dtype=torch.float32, device=logits.device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def truncate(scores: Tensor, sampling: SamplingParams) -> None:
    """Set to -inf, in place, what top-k, top-p and min-p exclude from scores [num_rows, vocab_size].

    Tokens tied with the last one kept are kept too, so that the result does not depend on a sort's order.
    """
    vocab_size = scores.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        threshold = scores.topk(sampling.top_k).values[:, -1:]
        scores.masked_fill_(scores < threshold, float("-inf"))
    if sampling.top_p < 1.0:
        scores.masked_fill_(scores < _top_p_threshold(scores, sampling.top_p), float("-inf"))
    if sampling.min_p > 0.0:
        best = scores.amax(-1, keepdim=True)
        floor = best + torch.log(torch.tensor(sampling.min_p, device=scores.device))
        scores.masked_fill_(scores < floor, float("-inf"))


def _top_p_threshold(scores: Tensor, top_p: float) -> Tensor:
    """Score [num_rows, 1] of the last token in the smallest set that reaches top_p."""
    vocab_size = scores.shape[-1]
    # In double: the order of a sum may depend on the number of rows, and its last bit would show in fp32.
    log_total = scores.double().logsumexp(-1, keepdim=True)
    num_candidates = min(_TOP_P_CANDIDATES, vocab_size)
    while True:
        # A few hundred candidates nearly always hold the mass; sorting the vocabulary is far dearer.
        best = scores.topk(num_candidates).values
        mass = (best - log_total).exp().cumsum(-1)
        if num_candidates == vocab_size or bool((mass[:, -1] >= top_p).all()):
            break
        num_candidates = min(num_candidates * 8, vocab_size)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=num_candidates - 1)
    return best.gather(-1, last)


def top_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return each row's token's log probability, and the best `num_top`. logits: [num_rows, vocab_size]."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(num_top)
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        (own, list(zip(row_ids, row_values, strict=True)))
        for own, (row_ids, row_values) in zip(chosen, rows, strict=True)
    ]

"""From logits to picks: processors, truncation and the shared-noise arg max.

The pick at position t is `argmax(processed logits)` at temperature 0 and
`argmax(processed logits / temperature + gumbel(seed, t))` above it, which samples from the softmax of the
processed logits (the Gumbel-max trick). It depends on nothing but the logits, the tokens before t, the
parameters and t, so any drafter meets the same pick.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from specdec.contract.draft_tree import NO_DRAFT, DraftTree
from specdec.contract.sampling import SamplingParams
from specdec.contract.token_noise import Words, noise_key
from specdec.runtime.contenders import picks_of_contenders
from specdec.runtime.kernels import rows as kernels
from specdec.runtime.kernels.layer import takes
from specdec.runtime.noise import GumbelNoise

_TOP_P_CANDIDATES = 256

_Value = TypeVar("_Value")


def arg_max(rows: Tensor) -> Tensor:
    """Return the index of each row's largest value, the first one's of several [num_rows].

    On a CPU a kernel or numpy finds it, with vector instructions that torch lacks there.
    """
    if rows.device.type != "cpu":
        return rows.argmax(-1)
    if takes(rows):
        return kernels.arg_max(rows)
    return torch.from_numpy(rows.detach().float().numpy().argmax(-1))


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
    mask: Tensor | None = None
    """The tokens that each row may pick [num_rows, num_words], int32 on the logits' device: bit i of word w
    stands for token 32 w + i. None: all that `sampling` allows."""

    @property
    def changes_logits(self) -> bool:
        """Whether more than noise and truncation comes between the logits and the picks."""
        return self.sampling.changes_logits or self.mask is not None

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

    def noise_keys(self, num_rows: int) -> list[int]:
        """Return the noise key of each of the first rows' positions."""
        return [noise_key(self.sampling.noise_seed, position) for position in self.positions(num_rows)]


class Picker:
    """Picks tokens. Keeps the noise generator's buffers: one per engine thread.

    Args:
        vocab_size: number of tokens.
        device: device of the logits.
        token_ids: the token of each column of the logits [num_tokens], ascending; all other tokens count as
            having a logit of -inf. None: the logits have a column for each token.
    """

    def __init__(self, vocab_size: int, device: torch.device, token_ids: Tensor | None = None) -> None:
        self._is_part = token_ids is not None
        self._token_ids = torch.arange(vocab_size, device=device) if token_ids is None else token_ids
        self._words: Words = self._token_ids.cpu().numpy().astype(numpy.uint32)
        self._noise = GumbelNoise(self._token_ids)

    def pick(self, logits: Sequence[Tensor], contexts: Sequence[PickContext]) -> list[list[int]]:
        """Return the target's pick for every row of every session.

        Args:
            logits: per session [num_rows, num_tokens]; what each row follows is in its context.
            contexts: per session.

        Returns:
            Per session num_rows token ids.
        """
        rows = self._processed(logits, contexts)
        greedy = [index for index, context in enumerate(contexts) if context.sampling.is_greedy]
        sampled = [index for index, context in enumerate(contexts) if not context.sampling.is_greedy]
        picks: list[list[int]] = [[] for _ in contexts]
        for indices, pick in ((greedy, self._greedy), (sampled, self._sampled)):
            if indices:
                found = iter(pick([rows[index] for index in indices], [contexts[index] for index in indices]))
                for index in indices:
                    picks[index] = list(islice(found, len(rows[index])))
        return picks

    def scores(self, logits: Sequence[Tensor], contexts: Sequence[PickContext]) -> Tensor:
        """Return processed and perturbed logits [all rows, num_tokens], fp32, whose arg max is the pick."""
        return self._scores(
            self._processed(logits, contexts),
            [context.sampling for context in contexts],
            [context.noise_keys(len(rows)) for rows, context in zip(logits, contexts, strict=True)],
        )

    def _processed(self, logits: Sequence[Tensor], contexts: Sequence[PickContext]) -> list[Tensor]:
        """Return the logits as they are or, of sessions that change them, changed copies in fp32."""
        processed = list(logits)
        for index, context in enumerate(contexts):
            if context.changes_logits:
                processed[index] = logits[index].to(torch.float32, copy=True)
                process_logits(processed[index], context, self._words if self._is_part else None)
        return processed

    def _greedy(self, rows: Sequence[Tensor], contexts: Sequence[PickContext]) -> list[int]:
        joined = _joined(rows)
        columns = arg_max(joined)
        if any(context.changes_logits for context in contexts):
            return self._tokens(columns, joined)
        found: list[int] = self._token_ids[columns].tolist()
        return found

    def _sampled(self, rows: Sequence[Tensor], contexts: Sequence[PickContext]) -> list[int]:
        keys = [context.noise_keys(len(part)) for part, context in zip(rows, contexts, strict=True)]
        samplings = [context.sampling for context in contexts]
        if self._token_ids.device.type != "cpu":
            return self._sampled_from_all(rows, samplings, keys)
        of_rows = [sampling for sampling, part in zip(samplings, rows, strict=True) for _ in part]
        key_of_rows = [key for part in keys for key in part]
        joined = _joined(rows).float()
        columns = picks_of_contenders(joined.numpy(), self._words, of_rows, key_of_rows)
        return [
            self._sampled_from_all([joined[row : row + 1]], [of_rows[row]], [[key_of_rows[row]]])[0]
            if column is None
            else int(self._words[column])
            for row, column in enumerate(columns)
        ]

    def _sampled_from_all(
        self, rows: Sequence[Tensor], samplings: Sequence[SamplingParams], keys: Sequence[Sequence[int]]
    ) -> list[int]:
        columns = arg_max(self._scores(rows, samplings, keys))
        return self._tokens(columns, _joined(rows))

    def _scores(
        self, rows: Sequence[Tensor], samplings: Sequence[SamplingParams], keys: Sequence[Sequence[int]]
    ) -> Tensor:
        """Perturb processed logits with the noise of all tokens [all rows, num_tokens], fp32.

        Args:
            keys: noise keys of the rows, per session.
        """
        scores = _joined([_scaled(part, sampling) for part, sampling in zip(rows, samplings, strict=True)])
        of_rows = [(sampling, key) for sampling, part in zip(samplings, keys, strict=True) for key in part]
        noisy = {row: key for row, (sampling, key) in enumerate(of_rows) if not sampling.is_greedy}
        if noisy:
            indices = torch.tensor(list(noisy), device=scores.device)
            scores.index_add_(0, indices, self._noise.at(list(noisy.values())))
        return scores

    def _tokens(self, columns: Tensor, rows: Tensor) -> list[int]:
        """Return the tokens of picked columns. A row without a possible token picks token 0."""
        tokens = self._token_ids[columns]
        if self._is_part:
            tokens.masked_fill_(rows.amax(-1) == float("-inf"), 0)
        found: list[int] = tokens.tolist()
        return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _scaled(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the scores that the noise is added to, in fp32; at temperature 0 the logits themselves."""
    if sampling.is_greedy:
        return logits.float()
    logits = logits.float()
    # Relative to the best: dividing by a temperature near 0 then cannot overflow to infinity.
    scores = (logits - logits.amax(-1, keepdim=True)).div_(sampling.temperature)
    truncate(scores, sampling)
    return scores


def process_logits(logits: Tensor, context: PickContext, token_ids: Words | None = None) -> None:
    """Apply bias, allowed tokens, the mask and penalties in place to logits [num_rows, num_tokens], fp32.

    Args:
        token_ids: the token of each column [num_tokens], ascending; None: the columns' numbers.
    """
    sampling = context.sampling
    if bias := _by_column(sampling.logit_bias, token_ids):
        values = torch.tensor(list(bias.values()), device=logits.device)
        logits[:, _indices(bias, logits.device)] += values
    if sampling.allowed_token_ids:
        columns = _by_column(dict.fromkeys(sampling.allowed_token_ids), token_ids)
        allowed = _indices(columns, logits.device)
        kept = logits[:, allowed]
        logits.fill_(float("-inf"))
        logits[:, allowed] = kept
    if context.mask is not None:
        assert token_ids is None, "a mask is about all tokens"
        logits.masked_fill_(~_unpacked(context.mask, logits.shape[1]), float("-inf"))
    if sampling.has_penalties:
        for row in range(len(logits)):
            _penalise(logits[row], context.tokens_before(row), context, token_ids)


def _unpacked(mask: Tensor, num_tokens: int) -> Tensor:
    """Return the bits of a mask [num_rows, num_words] as truth values [num_rows, num_tokens]."""
    octets = mask.view(torch.uint8)  # the lowest bits come first on every machine that torch runs on
    bits = octets[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.bitwise_and_(1).flatten(1)[:, :num_tokens].bool()


def _by_column(values: Mapping[int, _Value], token_ids: Words | None) -> Mapping[int, _Value]:
    """Return the values, given for tokens, of the columns. Tokens without a column are left out."""
    if token_ids is None or not values:
        return values
    tokens = numpy.fromiter(values, numpy.int64, len(values))
    columns = numpy.searchsorted(token_ids, tokens).clip(max=len(token_ids) - 1)
    found = (token_ids[columns] == tokens).tolist()
    items = zip(columns.tolist(), values.values(), found, strict=True)
    return {column: value for column, value, is_there in items if is_there}


def _penalise(logits: Tensor, tokens: list[int], context: PickContext, token_ids: Words | None) -> None:
    """Apply penalties to one row [num_tokens] that follows the tokens, in place."""
    sampling = context.sampling
    if sampling.repetition_penalty != 1.0:
        seen = _indices(_by_column(dict.fromkeys(tokens), token_ids), logits.device)
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        output = _by_column(Counter(tokens[context.prompt_length :]), token_ids)
        counts = torch.tensor(list(output.values()), dtype=torch.float32, device=logits.device)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
        logits[_indices(output, logits.device)] -= penalties


def _indices(columns: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(columns), dtype=torch.int64, device=device)


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

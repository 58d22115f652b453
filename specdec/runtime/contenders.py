"""Sampled picks from the few tokens that can win: on a CPU, the same picks as from the noise of all tokens.

The noise has a largest value. A token whose score is further than that below a score that was reached cannot
be the pick, so its noise need not be known. Only the other tokens, a row's contenders, get noise. Rounding
keeps the order of sums and of quotients, so the bound holds bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy
import numpy.typing
import torch

from specdec.contract.sampling import SamplingParams
from specdec.contract.token_noise import LARGEST_NOISE, Floats, Keys, Words, noise_of

_MAX_ROWS = 16
"""Most rows that are searched at once; it bounds the memory for rows where nearly every token can win."""
_CHUNK = 2**14
"""Number of contenders that get noise at once, few enough for a core's cache."""
_MARGIN = 0.01
"""How much lower than need be contenders are looked for, in units of the score; rounding is rarely more."""
_ROUNDING = 1e-6
"""More than the relative rounding error of a sum of exponentials."""
_EVERYTHING = (-math.inf, -math.inf)

_Indices = numpy.typing.NDArray[numpy.intp]
_Mask = numpy.typing.NDArray[numpy.bool_]


class _Contenders(NamedTuple):
    """Tokens of several rows, row after row and column after column."""

    rows: _Indices
    """The row of each [num_contenders]."""
    columns: _Indices
    """The column of each [num_contenders]."""
    scores: Floats
    """How far the logit of each is below the row's largest, over the temperature [num_contenders]."""

    def spans(self, num_rows: int) -> list[slice]:
        """Return where the contenders of each row are."""
        bounds = self.rows.searchsorted(numpy.arange(num_rows + 1)).tolist()
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def only(self, chosen: _Mask) -> _Contenders:
        """Return those of a mask [num_contenders]."""
        return _Contenders(self.rows[chosen], self.columns[chosen], self.scores[chosen])


def picks_of_contenders(
    logits: Floats, token_ids: Words, samplings: Sequence[SamplingParams], keys: Sequence[int]
) -> list[int | None]:
    """Pick a column in each row as the arg max of the truncated and perturbed scores of all tokens does.

    Args:
        logits: processed logits [num_rows, num_tokens].
        token_ids: the token of each column [num_tokens].
        samplings: parameters of each row, with a temperature above 0.
        keys: noise key of each row.

    Returns:
        A column for each row. None: the contenders do not decide the row.
    """
    picks: list[int | None] = []
    with numpy.errstate(all="ignore"):
        for first in range(0, len(logits), _MAX_ROWS):
            part = slice(first, first + _MAX_ROWS)
            picks += _picks(logits[part], token_ids, samplings[part], numpy.array(keys[part], numpy.uint64))
    return picks


def _picks(
    logits: Floats, token_ids: Words, samplings: Sequence[SamplingParams], keys: Keys
) -> list[int | None]:
    temperatures = numpy.array([sampling.temperature for sampling in samplings], numpy.float32)
    contenders, bounds = _sieved(logits, token_ids, temperatures, keys)
    contenders, certain = _truncated(contenders, samplings, bounds, logits.shape[1])
    perturbed = contenders.scores + _noise(keys[contenders.rows], token_ids[contenders.columns])
    picks: list[int | None] = []
    for span, least, bound in zip(contenders.spans(len(logits)), certain, bounds.tolist(), strict=True):
        if math.isnan(bound):
            picks.append(None)
            continue
        best = span.start + int(perturbed[span].argmax())
        picks.append(int(contenders.columns[best]) if contenders.scores[best] >= least else None)
    return picks


def _sieved(logits: Floats, token_ids: Words, temperatures: Floats, keys: Keys) -> tuple[_Contenders, Floats]:
    """Return the contenders of all rows, and an upper bound of the scores of each row's other tokens.

    The bound is NaN where other tokens could win.
    """
    each_row, num_tokens = numpy.arange(len(logits)), logits.shape[1]
    top = logits.argmax(-1)
    highest = logits[each_row, top]
    # The logit of the likeliest token counts as 0, so its noise is the score that it reaches.
    reached = noise_of(keys, token_ids[top])
    cuts = highest + temperatures * (reached - numpy.float32(LARGEST_NOISE + _MARGIN))
    (found,) = (logits >= cuts[:, None]).reshape(-1).nonzero()
    starts = found.searchsorted(numpy.arange(len(logits) + 1) * num_tokens)
    rows = each_row.repeat(starts[1:] - starts[:-1])
    scores = (logits.reshape(-1)[found] - highest[rows]) / temperatures[rows]
    bounds = (cuts - highest) / temperatures
    bounds[~(bounds + numpy.float32(LARGEST_NOISE) < reached)] = numpy.nan
    return _Contenders(rows, found - rows * num_tokens, scores), bounds


def _truncated(
    contenders: _Contenders, samplings: Sequence[SamplingParams], bounds: Floats, num_tokens: int
) -> tuple[_Contenders, list[float]]:
    """Return the contenders that truncation may keep, and the score from which it certainly does, by row."""
    if not any(map(_truncates, samplings)):
        return contenders, [-math.inf] * len(samplings)
    masses = num_tokens * numpy.exp(bounds.astype(numpy.float64))
    least = [
        _EVERYTHING if math.isnan(mass) else _least_kept(contenders.scores[span], sampling, mass, num_tokens)
        for span, sampling, mass in zip(
            contenders.spans(len(samplings)), samplings, masses.tolist(), strict=True
        )
    ]
    possible = numpy.array([score for score, _ in least], numpy.float32)
    chosen = contenders.scores >= possible[contenders.rows]
    return contenders.only(chosen), [score for _, score in least]


def _truncates(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _least_kept(
    scores: Floats, sampling: SamplingParams, mass_of_others: float, num_tokens: int
) -> tuple[float, float]:
    """Bound the score of the last token that truncation keeps in a row, from below and from above.

    Args:
        scores: scores of the row's contenders, which no other token exceeds [num_contenders].
        mass_of_others: upper bound of the sum of exp(score) of all other tokens.
    """
    possible = certain = -math.inf
    if 0 < sampling.top_k <= len(scores):
        place = len(scores) - sampling.top_k
        possible = certain = float(numpy.partition(scores, place)[place])
        scores = scores[scores >= possible]
    if sampling.top_p < 1.0:
        low, high = _nucleus(scores, sampling.top_p, mass_of_others, num_tokens)
        possible, certain = max(possible, low), max(certain, high)
    if sampling.min_p > 0.0:
        floor = torch.log(torch.tensor(sampling.min_p)).item()
        possible, certain = max(possible, floor), max(certain, floor)
    return possible, certain


def _nucleus(scores: Floats, top_p: float, mass_of_others: float, num_tokens: int) -> tuple[float, float]:
    """Bound the score of the last token of the smallest set that reaches top_p; see `_least_kept`."""
    mass = float(numpy.exp(scores).sum(dtype=numpy.float64))
    # Tokens that are less likely than that have less than 1 - top_p together.
    least = numpy.log((1.0 - top_p) * mass / num_tokens) - _MARGIN
    ordered = -numpy.sort(-scores[scores >= least])
    reached = numpy.exp(ordered.astype(numpy.float64)).cumsum()
    low = int(numpy.searchsorted(reached, top_p * mass * (1.0 - _ROUNDING)))
    high = int(numpy.searchsorted(reached, top_p * (mass + mass_of_others) * (1.0 + _ROUNDING)))
    return (
        float(ordered[high]) if high < len(ordered) else -math.inf,
        float(ordered[min(low, len(ordered) - 1)]),
    )


def _noise(keys: Keys, token_ids: Words) -> Floats:
    """Return the noise of pairs of a key and a token [num_pairs]."""
    if len(keys) <= _CHUNK:
        return noise_of(keys, token_ids)
    parts = (slice(first, first + _CHUNK) for first in range(0, len(keys), _CHUNK))
    return numpy.concatenate([noise_of(keys[part], token_ids[part]) for part in parts])

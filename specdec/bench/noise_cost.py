"""Measures what the shared Gumbel noise costs in a round."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class PickCosts(NamedTuple):
    """Median times to pick the tokens of a round, milliseconds."""

    greedy: float
    sampled: float
    """At the temperature, with noise."""


def measure(*, num_positions: int, vocab_size: int, repeats: int, temperature: float = 0.8) -> PickCosts:
    """Measure the picks of a round's positions, greedy and sampled in turns.

    A language model's logits decide how many tokens need noise. Here the token of rank r has the logit
    -2.2 * log(r), as the median of SmolLM2-135M's rows about has.
    """
    # Imported here: everything else in the benchmark runs without torch.
    from specdec.service.tuning import tune_process

    tune_process()
    import torch

    from specdec.contract.sampling import SamplingParams
    from specdec.runtime.picks import PickContext, Picker

    picker, logits = Picker(vocab_size, torch.device("cpu")), _logits(num_positions, vocab_size)
    samples: dict[float, list[int]] = {0.0: [], temperature: []}
    for length in range(1, repeats + 6):
        for asked, times in samples.items():
            context = PickContext(SamplingParams(temperature=asked, seed=0), [0] * length, length)
            started_ns = time.perf_counter_ns()
            picker.pick([logits], [context])
            times.append(time.perf_counter_ns() - started_ns)
    return PickCosts(*(statistics.median(times[5:]) / 1e6 for times in samples.values()))


def _logits(num_rows: int, vocab_size: int) -> Tensor:
    import torch

    ranked = -2.2 * torch.arange(1, vocab_size + 1).log()
    return torch.stack([ranked[torch.randperm(vocab_size)] for _ in range(num_rows)])

"""Measures what the shared Gumbel noise costs in a round."""

from __future__ import annotations

import statistics
import time


def measure(*, num_positions: int, vocab_size: int, repeats: int) -> float:
    """Return the median time to generate the noise of a round, milliseconds.

    The noise has `num_positions` rows over a vocabulary, fp32. It is made with as many threads as a service
    uses.
    """
    # Imported here: everything else in the benchmark runs without torch.
    from specdec.service.tuning import tune_process

    tune_process()
    from specdec.runtime.noise import GumbelNoise

    noise = GumbelNoise(vocab_size)
    samples = []
    for position in range(repeats + 5):
        started_ns = time.perf_counter_ns()
        noise(0, range(position, position + num_positions))
        samples.append(time.perf_counter_ns() - started_ns)
    return statistics.median(samples[5:]) / 1e6

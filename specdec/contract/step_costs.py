"""What a model's steps cost by their tokens, for the engine that makes them and the gateway that waits."""

from __future__ import annotations

import math

_FIRST_STEPS = 15
"""How many steps it takes to tell which are far off."""


class StepCosts:
    """What steps take, as a straight line over their tokens, which follows what is observed.

    Args:
        most_steps: how many steps the knowledge goes back.
        most_off: by which factor a step may be off the line and still count as it is: one that took long for
            a reason of its own then pulls the line only a little.
        least_variance: how much tokens must differ, in squares, for the line to tell what one costs.
    """

    def __init__(self, most_steps: float, *, most_off: float = math.inf, least_variance: float = 0.0) -> None:
        self._most_steps, self._most_off, self._least_variance = most_steps, most_off, least_variance
        self._weight = self._mean_tokens = self._mean_ns = 0.0
        self._variance = self._covariance = 0.0

    def add(self, num_tokens: float, step_ns: float) -> None:
        """Take a step in."""
        if self._weight >= _FIRST_STEPS and (usual := self(num_tokens)):
            step_ns = min(max(step_ns, usual / self._most_off), usual * self._most_off)
        self._weight = min(self._most_steps, self._weight + 1)
        share = 1 / self._weight
        tokens, ns = num_tokens - self._mean_tokens, step_ns - self._mean_ns
        self._mean_tokens += share * tokens
        self._mean_ns += share * ns
        self._variance += share * ((1 - share) * tokens * tokens - self._variance)
        self._covariance += share * ((1 - share) * tokens * ns - self._covariance)

    @property
    def token_ns(self) -> float:
        """What a token adds to a step, nanoseconds; 0 while all steps had as many."""
        if self._variance <= self._least_variance:
            return 0.0
        return max(0.0, self._covariance / self._variance)

    @property
    def fixed(self) -> float:
        """Time of a step without tokens, nanoseconds; that of any step while none was of another size."""
        return self(0)

    def __call__(self, num_tokens: float) -> float:
        """Return what a step of so many tokens takes, nanoseconds; 0 while nothing is known."""
        return max(0.0, self._mean_ns + self.token_ns * (num_tokens - self._mean_tokens))

"""The shared Gumbel noise of a few tokens, computed without torch; the bits equal `specdec.runtime.noise`.

The noise depends on the seed, the position and the token id, and on nothing else. Drafters that run no model
use this module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import numpy.typing

MASK64 = 2**64 - 1
MASK32 = 2**32 - 1
LN2 = 0.6931471805599453
# log(1 + f) = f * sum(c[i] * f**i) on [-1/4, 1/2]. The Chebyshev fit has a relative error below 9e-6,
# which is far less than any sample of picks could show.
LOG_COEFFICIENTS = (0.99999654, -0.49988109, 0.33366925, -0.25613856, 0.20327848, -0.10355278)
# The bits of 0.75f. Subtracting them first puts the mantissa in [3/4, 3/2), so that logarithms near 1 keep
# their relative accuracy.
THREE_QUARTERS_BITS = 0x3F400000
TOKEN_MULTIPLIER = 0x9E3779B1
HASH_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""The shifts and multipliers of `lowbias32` (C. Wellons), which ends with one more shift by 16."""

Floats = numpy.typing.NDArray[numpy.float32]
_Words = numpy.typing.NDArray[numpy.uint32]


def gumbel(seed: int, position: int, token_ids: Sequence[int]) -> Floats:
    """Return the noise of the given tokens, an array of shape [len(token_ids)].

    Args:
        seed: the request's seed, 0 to 2**64 - 1.
        position: index of the picked token in the sequence.
    """
    key = noise_key(seed, position)
    bits = numpy.array(token_ids, numpy.uint32) * numpy.uint32(TOKEN_MULTIPLIER)
    bits = _hash(_hash(bits + numpy.uint32(key & MASK32)) ^ numpy.uint32(key >> 32))
    # With 23 bits, k + 1/2 is exact in fp32 and the uniform number lies strictly between 0 and 1.
    uniform = ((bits >> numpy.uint32(9)).astype(numpy.float32) + numpy.float32(0.5)) * numpy.float32(2.0**-23)
    return _negative_log(_negative_log(uniform))


def noise_key(seed: int, position: int) -> int:
    """Return the 64-bit key that all tokens of a position share."""
    return _mix64(_mix64(seed) + position * 0x9E3779B97F4A7C15)


def _mix64(value: int) -> int:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014) to a Python integer."""
    value &= MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)


def _hash(x: _Words) -> _Words:
    for shift, multiplier in HASH_ROUNDS:
        x = (x ^ (x >> numpy.uint32(shift))) * numpy.uint32(multiplier)
    return x ^ (x >> numpy.uint32(16))


def _negative_log(x: Floats) -> Floats:
    """Return -log(x) of positive normal numbers. Each operation rounds as in `specdec.runtime.noise`."""
    bits = x.view(numpy.int32) - numpy.int32(THREE_QUARTERS_BITS)
    mantissa = (bits & numpy.int32(0x7FFFFF)) + numpy.int32(THREE_QUARTERS_BITS)
    fraction = mantissa.view(numpy.float32) - numpy.float32(1.0)
    out = fraction * numpy.float32(-LOG_COEFFICIENTS[-1])
    for coefficient in LOG_COEFFICIENTS[-2::-1]:
        out = (out - numpy.float32(coefficient)) * fraction
    exponent = (bits >> numpy.int32(23)).astype(numpy.float32)
    return out - exponent * numpy.float32(LN2)

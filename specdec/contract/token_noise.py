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
LARGEST_NOISE = 16.635536193847656
"""The noise of the largest uniform number, 1 - 2**-24. It is exact in fp32, and no noise is larger."""

Floats = numpy.typing.NDArray[numpy.float32]
Words = numpy.typing.NDArray[numpy.uint32]
Keys = numpy.typing.NDArray[numpy.uint64]

# Numbers as arrays: with an array, an operation on few tokens takes half as long as with a scalar.
_KEY_SHIFT = numpy.array(32, numpy.uint64)
_MULTIPLIER = numpy.array(TOKEN_MULTIPLIER, numpy.uint32)
_ROUNDS = [tuple(numpy.array(number, numpy.uint32) for number in numbers) for numbers in HASH_ROUNDS]
_LAST_SHIFT = numpy.array(16, numpy.uint32)
_UNIFORM_SHIFT = numpy.array(9, numpy.uint32)
_EXPONENT_SHIFT = numpy.array(23, numpy.int32)
_MANTISSA = numpy.array(0x7FFFFF, numpy.int32)
_THREE_QUARTERS = numpy.array(THREE_QUARTERS_BITS, numpy.int32)
_HALF, _ONE, _UNIT, _LN2 = (numpy.array(number, numpy.float32) for number in (0.5, 1.0, 2.0**-23, LN2))
_COEFFICIENTS = [numpy.array(number, numpy.float32) for number in LOG_COEFFICIENTS]
_NEGATIVE_LAST = numpy.array(-LOG_COEFFICIENTS[-1], numpy.float32)


def gumbel(seed: int, position: int, token_ids: Sequence[int]) -> Floats:
    """Return the noise of the given tokens, an array of shape [len(token_ids)].

    Args:
        seed: the request's seed, 0 to 2**64 - 1.
        position: index of the picked token in the sequence.
    """
    key = numpy.array(noise_key(seed, position), numpy.uint64)
    return noise_of(key, numpy.array(token_ids, numpy.uint32))


def noise_of(keys: Keys, token_ids: Words) -> Floats:
    """Return the noise of pairs of a position, given by its key, and a token. The shapes are broadcast."""
    low, high = keys.astype(numpy.uint32), (keys >> _KEY_SHIFT).astype(numpy.uint32)
    bits = _hash(_hash(token_ids * _MULTIPLIER + low) ^ high)
    # With 23 bits, k + 1/2 is exact in fp32 and the uniform number lies strictly between 0 and 1.
    uniform = ((bits >> _UNIFORM_SHIFT).astype(numpy.float32) + _HALF) * _UNIT
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


def _hash(x: Words) -> Words:
    for shift, multiplier in _ROUNDS:
        x = (x ^ (x >> shift)) * multiplier
    return x ^ (x >> _LAST_SHIFT)


def _negative_log(x: Floats) -> Floats:
    """Return -log(x) of positive normal numbers. Each operation rounds as in `specdec.runtime.noise`."""
    bits = x.view(numpy.int32) - _THREE_QUARTERS
    mantissa = (bits & _MANTISSA) + _THREE_QUARTERS
    fraction = mantissa.view(numpy.float32) - _ONE
    out = fraction * _NEGATIVE_LAST
    for coefficient in _COEFFICIENTS[-2::-1]:
        out = (out - coefficient) * fraction
    exponent = (bits >> _EXPONENT_SHIFT).astype(numpy.float32)
    return out - exponent * _LN2

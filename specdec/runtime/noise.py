"""Counter-based Gumbel noise: a function of (seed, position, token id) and of nothing else.

Shared by verifier and drafter so that both pick with the same randomness (Daliri, Musco, Suresh 2024,
"Coupling without communication and drafter-invariant speculative decoding"). The bits must agree between
processes and devices, so only operations that IEEE 754 and two's complement define exactly are used, one
per kernel: integer hashing, and logarithms from additions and multiplications. `torch.log` would differ in
the last bit between CPU and GPU, and a fused multiply-add would too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.contract.token_noise import (
    HASH_ROUNDS,
    LN2,
    LOG_COEFFICIENTS,
    MASK32,
    THREE_QUARTERS_BITS,
    TOKEN_MULTIPLIER,
    noise_key,
)


class GumbelNoise:
    """Generates standard Gumbel noise over given tokens, in buffers it keeps.

    Not safe for several threads at once: give each thread its own.

    Args:
        token_ids: the tokens [num_tokens], int64, on the device of the noise.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self._device = token_ids.device
        self._ids = _wrap(token_ids * TOKEN_MULTIPLIER)
        self._buffers = torch.empty(3, 0, len(token_ids), dtype=torch.int32, device=self._device)

    def __call__(self, seed: int, positions: Sequence[int]) -> Tensor:
        """Return the noise of `at` for positions of a request.

        Args:
            seed: the request's seed, 0 to 2**64 - 1.
            positions: index in the sequence of the token each row picks.
        """
        return self.at([noise_key(seed, position) for position in positions])

    def at(self, keys: Sequence[int]) -> Tensor:
        """Return noise [num_keys, num_tokens], fp32. It is valid until the next call.

        Args:
            keys: what `noise_key` returns for each row; keys may occur several times.
        """
        distinct = list(dict.fromkeys(keys))
        noise = self._of_distinct(distinct)
        if len(distinct) == len(keys):
            return noise
        return noise[torch.tensor([distinct.index(key) for key in keys], device=self._device)]

    def _of_distinct(self, keys: Sequence[int]) -> Tensor:
        rows = len(keys)
        if rows > self._buffers.shape[1]:
            self._buffers = torch.empty(3, rows, len(self._ids), dtype=torch.int32, device=self._device)
        bits, scratch, spare = self._buffers[:, :rows]
        low, high = _wrap(torch.tensor([[key & MASK32, key >> 32] for key in keys], device=self._device)).T
        torch.add(self._ids, low[:, None], out=bits)
        _hash(bits, scratch)
        bits.bitwise_xor_(high[:, None])
        _hash(bits, scratch)
        # 23 bits: k + 1/2 is then exact in fp32, and the uniform lies strictly between 0 and 1.
        _shift_right(bits, 9, out=bits)
        uniform = spare.view(torch.float32)
        uniform.copy_(bits).add_(0.5).mul_(2.0**-23)
        exponential = _negative_log(uniform, scratch.view(torch.float32), bits)
        return _negative_log(exponential, uniform, bits)


def _hash(x: Tensor, scratch: Tensor) -> None:
    """Apply a 32-bit finaliser in place: two xor-shift-multiply rounds."""
    for shift, multiplier in HASH_ROUNDS:
        _shift_right(x, shift, out=scratch)
        x.bitwise_xor_(scratch).mul_((multiplier + 2**31) % 2**32 - 2**31)
    _shift_right(x, 16, out=scratch)
    x.bitwise_xor_(scratch)


def _shift_right(x: Tensor, count: int, out: Tensor) -> None:
    """Shift int32 logically: torch shifts the sign in."""
    torch.bitwise_right_shift(x, count, out=out)
    out.bitwise_and_((1 << (32 - count)) - 1)


def _negative_log(x: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """Write -log(x) of positive normal fp32 x to `out`; x and scratch (int32) are overwritten."""
    bits = x.view(torch.int32)
    bits.sub_(THREE_QUARTERS_BITS)
    torch.bitwise_right_shift(bits, 23, out=scratch)  # the exponent; arithmetic, it may be negative
    bits.bitwise_and_(0x7FFFFF).add_(THREE_QUARTERS_BITS)
    fraction = x.sub_(1.0)
    torch.mul(fraction, -LOG_COEFFICIENTS[-1], out=out)
    for coefficient in LOG_COEFFICIENTS[-2::-1]:
        out.sub_(coefficient).mul_(fraction)
    exponent = x.copy_(scratch).mul_(LN2)
    return out.sub_(exponent)


def _wrap(x: Tensor) -> Tensor:
    """Return the low 32 bits of int64 as int32."""
    return ((x + 2**31) % 2**32 - 2**31).to(torch.int32)

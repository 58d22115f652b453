"""The shared noise: the same bits everywhere, and really Gumbel."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from specdec.contract.token_noise import LARGEST_NOISE, _negative_log, gumbel, noise_key, noise_of
from specdec.runtime.noise import GumbelNoise

VOCAB_SIZE = 49152
DIGEST = "0d445be90649c47cc0f4b42d75bb39c1ec4d4bbed0596a280a8bcf06dbec74ba"
"""SHA-256 of the noise of `sample`: a change here changes every sampled output there ever was."""


def sample(device: str = "cpu") -> torch.Tensor:
    """Return the noise of a few positions far apart, [9, vocab]."""
    noise = GumbelNoise(torch.arange(VOCAB_SIZE, device=device))
    return noise(2**63 + 5, [0, 1, 2, 1000, 2**20, 7, 8, 9, 2**31]).cpu().clone()


def digest(noise: torch.Tensor) -> str:
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest()


def test_bits_are_pinned() -> None:
    assert digest(sample()) == DIGEST


def test_threads_do_not_change_the_bits() -> None:
    torch.set_num_threads(2)
    try:
        assert digest(sample()) == DIGEST
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "threads"), [("verifier_service.server", 1), ("drafter_service.server", 2)]
)
def test_both_services_get_the_same_bits(module: str, threads: int) -> None:
    program = (
        f"import {module}, torch; torch.set_num_threads({threads}); "
        "from tests.unit.test_noise import sample, digest; print(digest(sample()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == DIGEST


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_the_same_bits() -> None:
    assert digest(sample("cuda")) == DIGEST


def test_a_row_depends_on_its_seed_and_position_alone() -> None:
    noise = GumbelNoise(torch.arange(1000))
    together = noise(7, [3, 4, 5]).clone()
    assert torch.equal(noise(7, [4])[0], together[1])
    assert torch.equal(noise(7, [5, 3])[1], together[0])
    assert not torch.equal(noise(8, [4])[0], together[1])
    # A larger vocabulary extends a row, it does not change it.
    assert torch.equal(GumbelNoise(torch.arange(2000))(7, [4])[0, :1000], together[1])


@pytest.mark.parametrize("token_ids", [[0], [VOCAB_SIZE - 1, 3, 3, 700], list(range(0, VOCAB_SIZE, 7)), []])
def test_the_noise_of_some_tokens_is_their_columns_bit_for_bit(token_ids: list[int]) -> None:
    for seed, positions in ((7, [3, 2**31, 5]), (2**64 - 1, [4]), (0, range(20))):
        everything = GumbelNoise(torch.arange(VOCAB_SIZE))(seed, positions)[:, token_ids].numpy()
        some = np.stack([gumbel(seed, position, token_ids) for position in positions])
        assert some.dtype == everything.dtype
        assert some.tobytes() == everything.tobytes()


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_values_are_gumbel_along_the_vocabulary_and_along_positions(seed: int) -> None:
    noise = GumbelNoise(torch.arange(VOCAB_SIZE))
    row = noise(seed, [11])[0].numpy().copy()
    # A vocabulary that ends with the column has the same values in it.
    column = GumbelNoise(torch.arange(18))(seed, range(8192))[:, 17].numpy().copy()
    for values in (row, column):
        assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert np.isfinite(row).all()


def test_nearby_seeds_are_independent() -> None:
    noise = GumbelNoise(torch.arange(VOCAB_SIZE))
    rows = [noise(seed, [5])[0].numpy().copy() for seed in range(4)]
    correlations = np.corrcoef(rows)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 0.02


def test_no_noise_is_larger_than_the_largest() -> None:
    uniform = (np.arange(2**23, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    assert 0 < uniform[0] < uniform[-1] < 1
    noise = np.concatenate([_negative_log(_negative_log(part)) for part in np.split(uniform, 256)])
    assert noise.max() == noise[-1] == LARGEST_NOISE
    assert (np.diff(noise) >= 0).all()


def test_the_noise_of_some_tokens_is_their_columns_at_every_position() -> None:
    token_ids = [3, 17, 18, 4000, VOCAB_SIZE - 1]
    everything, some = GumbelNoise(torch.arange(VOCAB_SIZE)), GumbelNoise(torch.tensor(token_ids))
    assert torch.equal(some(2**64 - 1, range(9)), everything(2**64 - 1, range(9))[:, token_ids])


def test_keys_may_occur_several_times() -> None:
    noise = GumbelNoise(torch.arange(100))
    keys = [noise_key(5, position) for position in (2, 9, 2, 2, 4)]
    rows = noise.at(keys).clone()
    assert torch.equal(rows, torch.stack([noise.at([key])[0].clone() for key in keys]))


def test_pairs_have_the_noise_of_their_key_and_token() -> None:
    pairs = [(4, 7), (4, 8), (2**31, 7), (0, VOCAB_SIZE - 1)]
    keys = np.array([noise_key(2**64 - 1, position) for position, _ in pairs], np.uint64)
    found = noise_of(keys, np.array([token_id for _, token_id in pairs], np.uint32))
    assert found.tolist() == [gumbel(2**64 - 1, position, [token_id])[0] for position, token_id in pairs]

from __future__ import annotations

import torch

from megatron_slm.selection.noise import GUMBEL, RANDOM_SCORE, gumbel, uniform, uniform_bits


def naive_bits(*words: int) -> int:
    """The same hash in Python's unbounded integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    state, *rest = words
    for word in rest:
        state = mix((state + 0x9E3779B9) % 2**32 ^ word)
    return state


def test_the_hash_is_the_one_of_unbounded_integers() -> None:
    samples, positions = [0, 1, 7, 2**33 + 5], [0, 1, 2047, 31]
    for seed in (0, 1234, 2**40 + 3):
        expected = [
            naive_bits(RANDOM_SCORE, seed % 2**32, seed >> 32, sample % 2**32, sample >> 32, position)
            for sample, position in zip(samples, positions, strict=True)
        ]
        assert uniform_bits(seed, RANDOM_SCORE, torch.tensor(samples), torch.tensor(positions)).tolist() == expected


def grid(num_samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(num_samples).repeat_interleave(length), torch.arange(length).repeat(num_samples)


def test_numbers_are_uniform_and_do_not_follow_their_counters() -> None:
    sample, position = grid(128, 512)
    u = uniform(1234, RANDOM_SCORE, sample, position)
    assert 0 <= float(u.min()) < float(u.max()) < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_square = float(((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum())
    assert 20 < chi_square < 120  # 63 degrees of freedom
    table = u.view(128, 512) - 0.5
    for one, other in ((table[:, 1:], table[:, :-1]), (table[1:], table[:-1])):
        assert abs(float((one * other).mean() / (table**2).mean())) < 0.02
    for other in (uniform(1235, RANDOM_SCORE, sample, position), uniform(1234, GUMBEL, sample, position)):
        assert abs(float(((other - 0.5) * (u - 0.5)).mean() / (table**2).mean())) < 0.02


def test_gumbel_noise_has_its_moments() -> None:
    g = gumbel(5, GUMBEL, *grid(256, 512)).double()
    assert g.isfinite().all()
    assert abs(float(g.mean()) - 0.5772) < 0.02
    assert abs(float(g.var()) - 1.6449) < 0.04


def test_a_token_has_its_number_wherever_it_is_asked_for() -> None:
    sample, position = grid(8, 16)
    whole = gumbel(3, GUMBEL, sample, position)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(3, GUMBEL, sample[order], position[order]), whole[order])
    assert torch.equal(gumbel(3, GUMBEL, sample[40:56], position[40:56]), whole[40:56])

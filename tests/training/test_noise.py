import hashlib
import math

import numpy as np
import pytest
import torch

from lightning_toys.training.noise import NoiseStream, keyed_generator, keyed_torch, normal, uniform

LIKE = torch.empty(0)


def draw(seed: int = 0, index: int = 0, stream: str = "a", n: int = 16) -> np.ndarray:
    return normal(keyed_generator(seed, index, stream), (n,))


def test_same_key_same_numbers() -> None:
    assert np.array_equal(draw(3, 5, "x0"), draw(3, 5, "x0"))
    both = keyed_generator(3, 5, "x0")
    again = keyed_generator(3, 5, "x0")
    both.random(1000)  # generators of one key share no state
    assert np.array_equal(normal(again, (16,)), draw(3, 5, "x0"))


def test_the_key_is_seed_and_stream_and_the_counter_the_index() -> None:
    """The layout is part of every run's results: numbers may not move with a refactoring."""
    tag = int.from_bytes(hashlib.blake2b(b"x0", digest_size=8).digest(), "little")
    philox = np.random.Philox(key=7 + (tag << 64), counter=2 << 128)
    expected = np.random.Generator(philox).standard_normal(16, dtype=np.float32)
    assert np.array_equal(draw(7, 2, "x0"), expected)


@pytest.mark.parametrize("other", [(1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (2**63, 0, "a"), (2**32, 0, "a")])
def test_any_other_key_gives_other_numbers(other: tuple[int, int, str]) -> None:
    assert not np.isin(draw(n=1000), draw(*other, n=1000)).all()
    correlation = np.corrcoef(draw(n=10_000), draw(*other, n=10_000))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(10_000)


def test_many_keys_have_no_collision() -> None:
    first = {keyed_generator(s, i, n).bit_generator.random_raw() for s in range(20) for i in range(20) for n in "abcde"}
    assert len(first) == 2000


def test_neighbouring_indices_do_not_overlap() -> None:
    """An index is not a position: 100 000 draws at index 0 meet none of index 1."""
    a, b = (keyed_generator(0, i, "a").bit_generator.random_raw(100_000) for i in (0, 1))
    assert np.intersect1d(a, b).size == 0


def test_moments_of_the_normal_distribution() -> None:
    x = normal(keyed_generator(0, 0, "test/normal"), (100_000,))
    n = x.size
    assert x.dtype == np.float32
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x.astype(float) ** power).mean() - moment) < 5 * math.sqrt(variance / n)


def test_moments_of_the_uniform_distribution() -> None:
    x = uniform(keyed_generator(0, 0, "test/uniform"), (100_000,))
    n = x.size
    assert x.dtype == np.float32
    assert x.min() >= 0
    assert x.max() < 1
    for power in (1, 2, 3):
        variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs((x.astype(float) ** power).mean() - 1 / (power + 1)) < 5 * math.sqrt(variance / n)


def test_moments_over_seeds_and_indices() -> None:
    """First draws of 4000 neighbouring keys are as independent as draws of one generator."""
    x = np.array([[draw(s, i, "b", 1)[0] for i in range(40)] for s in range(100)], dtype=float)
    assert abs(x.mean()) < 5 / math.sqrt(4000)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / 4000)
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 5 / math.sqrt(3900)
    assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(3960)


def test_a_stream_is_a_direct_keyed_draw() -> None:
    seeds = [4, 9]
    for distribution in (normal, uniform):
        stream = NoiseStream(seeds, "x0", (3, 2), distribution, block=8)
        for step in (0, 7, 8, 21):
            found = stream.at(step, LIKE)
            assert found.shape == (2, 3, 2)
            for r, seed in enumerate(seeds):
                direct = distribution(keyed_generator(seed, step // 8, "x0"), (8, 3, 2))[step % 8]
                assert torch.equal(found[r], torch.from_numpy(direct))


def test_a_stream_is_independent_of_the_order_of_access() -> None:
    steps = [0, 1, 63, 64, 65, 127, 128, 500]
    forward, backward = NoiseStream([0, 1], "t", (4,)), NoiseStream([0, 1], "t", (4,))
    a = {s: forward.at(s, LIKE).clone() for s in steps}
    b = {s: backward.at(s, LIKE).clone() for s in [*reversed(steps), *steps]}
    for s in steps:
        assert torch.equal(a[s], b[s])
        assert torch.equal(a[s], NoiseStream([0, 1], "t", (4,)).at(s, LIKE))
    assert len({tuple(x.flatten().tolist()) for x in a.values()}) == len(steps)


def test_a_replica_of_many_is_the_solo_stream() -> None:
    many = NoiseStream([5, 2, 8], "x0", (3,))
    for r, seed in enumerate([5, 2, 8]):
        assert torch.equal(many.at(70, LIKE)[r], NoiseStream([seed], "x0", (3,)).at(70, LIKE)[0])


def test_names_and_blocks_are_part_of_the_key() -> None:
    base = NoiseStream([0], "x0", (3,)).at(9, LIKE)
    assert not torch.equal(base, NoiseStream([0], "t", (3,)).at(9, LIKE))
    assert not torch.equal(base, NoiseStream([0], "x0", (3,), block=8).at(9, LIKE))


def test_dtype_follows_like() -> None:
    stream = NoiseStream([0], "x0", (3,))
    single, double = stream.at(5, LIKE), stream.at(5, LIKE.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(single.double(), double)
    assert torch.equal(stream.at(5, LIKE), single)


def test_no_global_state_is_touched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    before = draw()
    NoiseStream([0, 1], "x0", (5,)).at(100, LIKE)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert np.array_equal(draw(), before)


def test_keyed_torch_differs_by_every_part_of_its_key_and_leaves_no_trace() -> None:
    def drawn(seed: int, index: int, stream: str) -> tuple[float, ...]:
        with keyed_torch(seed, index, stream, torch.device("cpu")):
            return tuple(torch.rand(3).tolist())

    before = torch.get_rng_state()
    keys = [(3, 7, "dropout"), (4, 7, "dropout"), (3, 8, "dropout"), (3, 7, "other")]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(*keys[0]) == drawn(*keys[0])
    assert torch.equal(torch.get_rng_state(), before)

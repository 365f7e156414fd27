"""Shares off the modes from many actions: closed forms, log-time Euler, and the width that likelihood chooses."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gallery import shares
from lightning_toys.generative_policy import ThreeModes
from lightning_toys.training.noise import keyed_generator


def normals(n: int, index: int, seeds: tuple[int, ...] = (0, 1)) -> Tensor:
    return torch.from_numpy(np.stack([keyed_generator(s, index, "test").standard_normal((n, 2)) for s in seeds]))


def test_shares_are_those_of_a_known_distribution() -> None:
    """Actions of the mode at (0, .5) alone, twice as wide as it is: tv and the shares have closed forms."""
    target = ThreeModes(0.02)
    found = shares.shares(lambda n, index: torch.tensor([0.0, 0.5]) + 0.04 * normals(n, index), target, 200_000)
    assert found["tv"] == pytest.approx([1 - 1.4 / 3.6] * 2)
    for k in (3, 5, 10):  # beyond k / 2 of its own standard deviations: e^(-k^2 / 8)
        p = math.exp(-(k**2) / 8)
        for share in found[f"off{k}"]:
            assert abs(share - p) < 4 * math.sqrt(p / 200_000), k
        assert found[f"off{k}"][0] != found[f"off{k}"][1] or k == 10
    entropy = math.log(2 * math.pi * math.e * 0.04**2)
    assert found["entropy_knn"] == pytest.approx([entropy] * 2, abs=0.03)


def test_chunks_are_different_actions() -> None:
    asked: list[int] = []

    def draw(n: int, index: int) -> Tensor:
        asked.append(index)
        return normals(n, index)

    shares.shares(draw, ThreeModes(0.02), 3 * shares.CHUNK)
    assert asked == [1, 2, 3]


def test_log_times() -> None:
    times = shares.log_times(8)
    assert len(times) == 9
    assert times[0] == 1
    assert times[-2:] == pytest.approx([shares.LAST, 0.0])
    ratios = [b / a for a, b in pairwise(times[:8])]
    assert ratios == pytest.approx([ratios[0]] * 7)


def test_euler_goes_from_noise_to_data() -> None:
    """Of one point x the velocity is (z - x) / t: any times lead to x at once, and a sign the other way does not."""
    x, e = torch.tensor([0.3, -0.2]), normals(5, 0)
    times = shares.log_times(8)
    found = shares.euler(lambda z, t: (z - x) / t, e, times)
    assert torch.allclose(found, x.double().expand_as(e), atol=1e-6)
    # dz/dt = z from t = 1 to 0: each step takes the factor 1 - (its length)
    factor = math.prod(1 - (a - b) for a, b in pairwise(times))
    assert torch.allclose(shares.euler(lambda z, t: z, e, times), factor * e)


def test_logarithmic_times_are_nearer_to_a_narrow_mode() -> None:
    """The exact velocity of N(0, .02^2 I): the width that eight steps leave, even and logarithmic."""
    s, e = 0.02, normals(1000, 3)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * z

    even = shares.euler(velocity, e, [1 - k / 8 for k in range(9)]).std() / s
    logarithmic = shares.euler(velocity, e, shares.log_times(8)).std() / s
    assert abs(float(logarithmic) - 1) < 0.5 * abs(float(even) - 1)


def test_likelihood_chooses_the_missing_width() -> None:
    """The map's variance is .75 of the target's: the noise that is missing has .25, and .5 is its width."""
    held_out, points = normals(4000, 1, (0,))[0], normals(4000, 2, (0,))[0]
    assert shares.likeliest_width(points * math.sqrt(0.75), held_out, [0.0, 0.3, 0.4, 0.5, 0.6, 0.8]) == 0.5
    assert shares.likeliest_width(points, held_out, [0.1, 0.2, 0.3, 0.5]) < 0.5


def test_noise_is_keyed_by_seed_and_has_its_own_width() -> None:
    draw = shares.with_noise(lambda n, index: torch.zeros(2, n, 2), [0.1, 0.3], [4, 5])
    a, b = draw(20_000, 1), draw(20_000, 1)
    assert torch.equal(a, b)
    assert not torch.equal(a, draw(20_000, 2))
    assert a[0].std() == pytest.approx(0.1, rel=0.03)
    assert a[1].std() == pytest.approx(0.3, rel=0.03)
    assert not torch.allclose(a[0] * 3, a[1])


def test_a_run_is_read_by_its_own_weights_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_toys.cli import main

    small = ["--trainer.max_steps", "3", "--model.seeds", "[4,5]", "--model.evaluation.samples", "200"]
    small += ["--model.network.hidden", "8", "--model.network.layers", "2", "--data.target", "EightGaussians"]
    place = ["--run.root", str(tmp_path), "--run.variant", "v", "--run.name", "n"]
    assert main(["fit", "-c", "generative_policy/meanflow", *small, *place]) == 0, capsys.readouterr().err
    folder = tmp_path / "generative_policy" / "v" / "n"
    words = ["--readouts", "1", "noise", "--weights", "ema", "raw", "--samples", "50000"]
    monkeypatch.setattr(sys, "argv", ["shares", "--out", str(folder / "table.md"), *words, "--ckpt_path", "last"])
    monkeypatch.setattr(shares, "HELD_OUT", 500)  # the width is asked of as many pairs as both numbers multiplied
    monkeypatch.setattr(shares, "NEIGHBOURS", 2000)
    shares.main()
    found: dict[str, Any] = json.loads((folder / "shares.json").read_text())
    assert list(found["rows"]) == ["1", "noise", "1 raw", "noise raw"]
    assert found["seeds"] == [4, 5]
    assert found["rows"]["1"]["tv"] != found["rows"]["1 raw"]["tv"]
    policy, target = shares.load(folder)
    assert len(target.mode_weights) == 8
    x = policy.sample(shares.CHUNK, "1", 1)
    own = shares.weights_and_shares(x[1].double(), target)
    assert found["rows"]["1"]["off3"][1] == pytest.approx(own["off3"])
    assert (folder / "table.md").read_text().startswith("| actions | tv | off3 |")
    # of the last step's weights: a policy that is one step further has others
    policy.evaluation.weights = "raw"
    assert not torch.equal(policy.sample(50, "1", 1), x[:, :50])

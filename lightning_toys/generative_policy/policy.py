"""GenerativePolicy: the base of the policies without a state, and how their samples are evaluated."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import REPEATS, WHOLE, bounded, check_settings, require
from lightning_toys.generative_policy import figures
from lightning_toys.generative_policy.actors import Actor
from lightning_toys.generative_policy.data import MixtureData
from lightning_toys.generative_policy.flow_ode import flow_sample
from lightning_toys.generative_policy.metrics import compute_metrics
from lightning_toys.generative_policy.plain_policy import PlainPolicy
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.configuration import require_data, unused_flags
from lightning_toys.training.inference import require_built, with_replica_axis
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.results import Report

CHUNK_ROWS = 2**14  # rows of one replica that go through a network at a time
FIGURE_SAMPLES = 2000  # samples kept for figures


def share_count(metric: str, samples: int) -> float:
    """Return of how many samples a metric is a share, 1 of what a seed did or did not; 0 of what is no share.

    A total variation lies in [0, 1] too, but is no share k / n: ``inf``.

    >>> [share_count(m, 200) for m in ("off3@8", "weight_mode1", "chose_mode0", "entropy_knn", "tv")]
    [200, 200, 1, 0, inf]
    """
    name = metric.partition("@")[0]
    if name == "tv":
        return math.inf
    if name.startswith("chose_mode"):
        return 1
    return samples if name in ("off3", "off5", "off10") or name.startswith("weight_mode") else 0


@dataclass
class Evaluation:
    """How samples are drawn and evaluated. Metrics without a readout in their name are of the first entry of ``nfe``.

    Args:
        samples: samples of each replica.
        pairs: number of them for the energy distance, whose cost is quadratic.
        neighbours: k of the k-nearest-neighbour entropy.
        nfe: numbers of network evaluations that validations within `fit` evaluate.
        test_nfe: those that `test` evaluates.
        weights: ``raw``, or ``ema`` (needs ``ema_decay``).

    Raises:
        ToyError: a value is not allowed.
    """

    samples: int = 20_000
    pairs: int = 4096
    neighbours: int = 5
    nfe: list[int] = field(default_factory=lambda: [1, 2, 8])
    test_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    weights: Literal["raw", "ema"] = "raw"

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.evaluation.")
        flag = "--model.evaluation"
        bounded(f"{flag}.neighbours", self.neighbours, 1)
        least = max(100, self.neighbours + 1)
        bounded(f"{flag}.samples", self.samples, least)
        bounded(f"{flag}.pairs", self.pairs, 2)
        for name in ("nfe", "test_nfe"):
            values = getattr(self, name)
            for value in values:
                bounded(f"{flag}.{name}", value, 1, REPEATS)
            ok = len(values) > 0 and len(set(values)) == len(values)
            require(ok, f"{flag}.{name}: {values} is not allowed; give different integers >= 1, such as [1, 2, 8]")


class GenerativePolicy(ToyModule):
    """Base of the policies without a state: samples actions, which are compared with the target."""

    experiment = "generative_policy"
    comparison_figures = "lightning_toys.generative_policy.figures.compare_figures"
    evaluation: Evaluation
    headline: Sequence[str] = ("tv", "off3", "entropy_knn")
    error_metrics: Sequence[str] = ("tv", "sliced_w2", "sigma", "loss_unweighted")
    metric_labels: Mapping[str, str] = {
        "tv": "total variation of the mode weights",
        "off3": "share of samples beyond 3 standard deviations of every mode",
        "off5": "share of samples beyond 5 standard deviations of every mode",
        "off10": "share of samples beyond 10 standard deviations of every mode",
        "energy_distance": "energy distance to the target",
        "sliced_w2": "sliced 2-Wasserstein distance to the target",
        "entropy_knn": "entropy, k-nearest-neighbour estimate (nats)",
        "entropy_exact": "entropy, exact change of variables (nats)",
        "entropy_surrogate": "entropy surrogate (nats)",
        "kl": "reverse KL to the target (nats)",
        "nll": "negative log-likelihood of reference samples (nats)",
        "effective_samples": "effective sample size of the sampler",
        "log_z": "logarithm of the density's integral, estimated",
    }
    readout_pattern: str = ".*"  # a regular expression of the readouts that :meth:`actions` knows
    figure_data: figures.FigureData | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # neither changes with training
        self.target_samples: list[Tensor] = []
        self.baseline_cache: dict[bool, dict[str, dict[str, float]]] = {}

    @property
    def data(self) -> MixtureData:
        """The data module that the Trainer runs with."""
        return require_data(self.trainer.datamodule, MixtureData)  # type: ignore[attr-defined]

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = require_data(data, MixtureData)
        require(
            self.evaluation.weights != "ema" or self.ema_decay is not None,
            "--model.evaluation.weights: 'ema' needs --model.ema_decay",
        )
        return {"batch_size": data.batch_size, "scale": data.scale, "dim": data.target.dim}

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        out = super().unused_settings()
        return out if self.ema_decay is not None else out | unused_flags("--model.ema_decay", "ema_warmup")

    @property
    def dim(self) -> int:
        """D, the number of an action's coordinates."""
        return int(self.sizes.get("dim", 2))  # older checkpoints are of the plane

    @property
    def evaluation_net(self) -> nn.Module:
        """The weights that are evaluated."""
        net = self.ema_net if self.evaluation.weights == "ema" else self.net
        assert net is not None
        return net

    # what a policy defines

    def training_target(self, target: Target) -> Target:
        """Return the distribution that samples for training are drawn from; the target itself unless overridden."""
        return target

    def readouts(self, nfes: list[int], full: bool) -> list[str]:
        """Return the names of the ways to sample actions, the main one first.

        Args:
            nfes: numbers of network evaluations.
            full: whether `test` asks, which may have more.
        """
        raise NotImplementedError

    def actions(self, readout: str, e: Tensor, xi: Tensor) -> Tensor:
        """Return actions (R, n, D) from standard normals e (R, n, D), and xi (R, n, D) for policies that need two."""
        raise NotImplementedError

    def actor(self) -> Actor:
        """Return the policy by the weights that are evaluated, as a function of a state without numbers."""
        raise NotImplementedError

    def plain(self) -> PlainPolicy:
        """Return the policy as a plain module of all replicas, a copy: ``act``, ``log_prob``, ``entropy``.

        Raises:
            ToyError: there is no network yet.
        """
        require_built(self)
        return PlainPolicy(copy.deepcopy(self.actor()), self.seeds, 0, self.dim, bounded=False)

    def policy_metrics(self, readout: str, e: Tensor, main: bool, full: bool) -> dict[str, Tensor]:
        """Return further metrics (R,) by name, of the policy itself: entropies, divergences.

        Args:
            readout: the way of sampling.
            e: standard normals (R, n, D).
            main: whether ``readout`` is the main one.
            full: whether `test` asks.
        """
        return {}

    # evaluation

    def evaluation_noise(self, stream: str, n: int, index: int = 0) -> Tensor:
        """Return standard normals (R, n, D), float32, keyed by seed, stream and index; evaluations have index 0."""
        stream = f"evaluation/{stream}"
        rows = [keyed_generator(s, index, stream).standard_normal((n, self.dim), np.float32) for s in self.seeds]
        return torch.from_numpy(np.stack(rows))

    @property
    def main_readout(self) -> str:
        """The readout of the metrics that name none."""
        return self.readouts(self.evaluation.nfe, False)[0]

    def forward(self, e: Tensor, xi: Tensor | None = None, readout: str | None = None) -> Tensor:
        """Map noise to actions: e (N, D) or (R, N, D), standard normals, to (R, N, D).

        By the weights of ``evaluation``; differentiable, on the device and in the dtype of the weights. Without a
        replica axis every replica is given the same noise.

        Args:
            e: the noise that the policy maps.
            xi: noise of a learned sigma, shaped as e; keyed by the replica's seed if left out, the same at every call.
                Policies without one do not use it.
            readout: how to sample, as in the metrics' names; the first of ``evaluation.nfe`` if left out.

        Raises:
            ToyError: there is no network yet, a shape does not fit, or there is no such readout.
        """
        require_built(self)
        readout = self.main_readout if readout is None else readout
        known = re.fullmatch(self.readout_pattern, readout) is not None
        example = ", ".join(self.readouts(self.evaluation.nfe, True))
        require(known, f"readout: {readout!r} is not allowed; give one such as {example}")
        like, R = next(self.net.parameters()), len(self.seeds)
        e = with_replica_axis(e, R, (self.dim,), "e").to(like)
        xi = with_replica_axis(self.evaluation_noise("xi", e.shape[1]) if xi is None else xi, R, (self.dim,), "xi").to(
            like
        )
        require(xi.shape == e.shape, f"xi: {xi.shape[1]} rows are not allowed; give {e.shape[1]}, as many as of e")
        rows = zip(torch.split(e, CHUNK_ROWS, dim=1), torch.split(xi, CHUNK_ROWS, dim=1), strict=True)
        return torch.cat([self.actions(readout, a, b) for a, b in rows], dim=1)

    @torch.no_grad()
    def sample(self, n: int, readout: str | None = None, index: int = 0) -> Tensor:
        """Sample n actions of each replica, without gradients: (R, n, D).

        Args:
            n: number of actions.
            readout: how to sample, as in :meth:`forward`.
            index: different numbers give independent samples; 0 gives those of evaluations.

        Raises:
            ToyError: there is no network yet, a number is not allowed, or there is no such readout.
        """
        bounded("n", n, 1)
        bounded("index", index, 0, WHOLE)
        return self.forward(self.evaluation_noise("e", n, index), self.evaluation_noise("xi", n, index), readout)

    def sample_metrics(self, samples: Iterable[Tensor], pooled: bool = False) -> list[dict[str, float]]:
        """Return the metrics of each replica's samples (n, D), against reference samples of the target.

        ``pooled`` samples are drawn with replacement from the target's particles.
        """
        ev, target = self.evaluation, self.data.target
        if not self.target_samples:
            self.target_samples = [self.data.reference(s, ev.samples) for s in self.seeds]
        return [
            compute_metrics(x, target, y, ev.pairs, ev.neighbours, pooled)
            for x, y in zip(samples, self.target_samples, strict=True)
        ]

    def evaluate(self, full: bool) -> Report:
        """Sample by every readout, and compute the metrics."""
        ev, target = self.evaluation, self.data.target
        like = next(self.net.parameters())
        metrics: dict[str, list[float]] = {}
        first = ev.nfe[:1]
        nfes = [*first, *(n for n in ev.test_nfe if n not in first)] if full else ev.nfe
        names = self.readouts(nfes, full)
        samples: dict[str, Tensor] = {}
        e = self.evaluation_noise("e", min(ev.samples, CHUNK_ROWS)).to(like)
        for i, name in enumerate(names):
            x = self.sample(ev.samples, name).cpu().double()
            samples[name] = x[:, :FIGURE_SAMPLES]
            rows = self.sample_metrics(x)
            found = {k: [row.get(k, float("nan")) for row in rows] for k in dict.fromkeys(k for r in rows for k in r)}
            found |= {k: v.double().tolist() for k, v in self.policy_metrics(name, e, i == 0, full).items()}
            if i == 0:
                metrics |= found
            if len(names) > 1:
                metrics |= {f"{k}@{name}": v for k, v in found.items() if "_mode" not in k}
        metrics |= self.data.sampler_metrics(self.seeds, self.reads_data)
        # of a target without modes, or without a density, what can be said of it
        own = type(self).headline
        known = [k for k in dict.fromkeys((*own, "nll", "sliced_w2", "energy_distance")) if k in metrics]
        self.headline = tuple(known[: max(3, len(own))])
        self.figure_data = figures.FigureData(target, samples, self.seeds, ev.samples, self.target_samples[0])
        counts = {k: share_count(k, ev.samples) for k in metrics}
        shares = {k: n for k, n in counts.items() if n}
        return Report(self.seeds, metrics, self.baselines(full), shares=shares)

    def baselines(self, full: bool) -> dict[str, dict[str, float]]:
        """Return the baselines' metrics: other samples of the target, and (``full``) Euler steps of its exact flow."""
        if full in self.baseline_cache:
            return self.baseline_cache[full]
        ev, target = self.evaluation, self.data.target
        noise = self.evaluation_noise("e", ev.samples).double()
        rows: dict[str, Iterable[Tensor]] = {self.data.baseline: [self.data.another(s, ev.samples) for s in self.seeds]}
        if full and target.has_velocity:
            for name, nfe in (("exact_flow_1", 1), ("exact_flow_8", 8), ("exact_flow_64", 64)):
                rows[name] = flow_sample(target.marginal_velocity, noise, "euler", nfe)
        out: dict[str, dict[str, float]] = {}
        for name, samples in rows.items():
            found = self.sample_metrics(samples, name == self.data.baseline and not target.has_samples)
            out[name] = {k: float(np.mean([f[k] for f in found if k in f])) for k in found[0] if "_mode" not in k}
        if not target.has_samples:  # particles are drawn with replacement: equal ones have no distance
            out[self.data.baseline].pop("entropy_knn")
        out[self.data.baseline] |= self.data.baseline_metrics(self.seeds)
        self.baseline_cache[full] = out
        return out

    # Lightning

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate every readout of ``evaluation.nfe``."""
        report = self.evaluate(full=False)
        self.last_report = report
        self.write_evaluation(report)
        if self.trainer.sanity_checking:
            return
        writes = self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if writes and self.keeps_files and self.trainer.state.fn == "fit":
            assert self.figure_data is not None
            figures.save_snapshot(self.run_folder, self.global_step, self.figure_data)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate every readout of `test`."""
        report = self.evaluate(full=True)
        self.last_report = report
        main = {f"test/{k}": torch.tensor(report.metrics[k]) for k in self.headline if k in report.metrics}
        self.write_scalars(main, self.loaded_step, {f"test/{k}": n for k, n in report.shares.items()})

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return ``samples`` (R, n, D) by the main readout, and the ``target``'s (R, m, D).

        Where the target has a density, its ``log_prob`` (R, n) at the policy's samples too.
        """
        ev, target = self.evaluation, self.data.target
        x = self.sample(ev.samples).cpu().double()
        truth = torch.stack([self.data.reference(s, ev.samples) for s in self.seeds])
        return {"samples": x, "target": truth, **({"log_prob": target.log_prob(x)} if target.has_density else {})}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.figure_data is None or self.last_report is None:
            return {}
        return figures.draw_all(self.figure_data, self.last_report, folder, self.label)

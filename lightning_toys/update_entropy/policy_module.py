"""What update_entropy's policies are trained by: imitation of worked solutions, then Dr. GRPO, with AdamW for each."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_toys.errors import note, require
from lightning_toys.training.checkpoint_format import unlike
from lightning_toys.training.configuration import require_data
from lightning_toys.training.loader import Block, DrawnBlock
from lightning_toys.training.module import ToyModule
from lightning_toys.training.results import Report
from lightning_toys.update_entropy.checkpoints import (
    check_temperature,
    load_adapter,
    load_backbone,
    resolve_backbone,
)
from lightning_toys.update_entropy.data import FREE, TextData
from lightning_toys.update_entropy.estimators import entropy
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.grpo import Clipping
from lightning_toys.update_entropy.policy import TinyPolicy, is_adapter
from lightning_toys.update_entropy.probe import Plan
from lightning_toys.update_entropy.training import (
    STORED,
    PolicyBatch,
    Rollouts,
    clip_gradients,
    policy_gradient,
    rows_of,
    sample,
    side_by_side,
    stored_misfit,
    supervised_loss,
)

WARM_UP = 50  # supervised steps over which the learning rate rises


class PolicyModule(ToyModule):
    """Policies, a language model for each seed, trained one after the other within a step.

    Attributes:
        policy: the language model and its adapter.
        rollouts: how responses are drawn.
        plan: of the probe; here, what kind of entropy is meant.
        warm_steps: supervised steps before the policy gradient's.
        warm_lr: their learning rate, which rises for :data:`WARM_UP` steps and falls to 0 at the last.
        betas: decay of AdamW's two moments in the policy gradient.
        clipping: bounds of the ratio of new to old probability.
        eval_prompts: prompts of a validation, one response each.
        backbone: a real model in the place of the tiny one.
        adapter: folder of a peft adapter to go on from.
        batches: of each replica, the responses that are being learned from.
        loaded_optimizers: states of a checkpoint's optimisers.
        prepared: the backbone, once it has been read: a list, since a submodule would be in checkpoints beside the net.
    """

    experiment = "update_entropy"
    policy: TinyPolicy
    rollouts: Rollouts
    plan: Plan
    warm_steps: int
    warm_lr: float
    betas: tuple[float, float]
    clipping: Clipping
    eval_prompts: int
    backbone: str | None
    adapter: str | None
    batches: list[PolicyBatch]
    loaded_optimizers: list[dict[str, Any]]
    prepared: list[nn.Module]

    # building

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        text = require_data(data, TextData)
        if self.backbone is not None:
            return {"vocabulary": 0, "positions": 0}  # the backbone has its own
        positions = text.longest_prompt + text.longest_response + FREE
        return {"vocabulary": text.tokens.size, "positions": positions}

    def build(self) -> nn.Module:
        """See :meth:`ToyModule.build`: one policy a replica."""
        if self.backbone is None:
            return nn.ModuleList(self.policy_of(s) for s in self.seeds)
        if not self.prepared:  # which takes long to load, and is asked for twice
            self.prepared = [nn.ModuleList(self.policy_of(s) for s in self.seeds)]
        return self.prepared[0]

    def policy_of(self, seed: int) -> nn.Module:
        """Return the policy of a replica."""
        if self.backbone is None:
            return self.policy.build(seed, self.sizes["vocabulary"], self.sizes["positions"])
        model = load_backbone(resolve_backbone(self.backbone), torch.get_default_dtype())
        adapted = self.policy.adapted(model, seed) if self.adapter is None else load_adapter(model, self.adapter)
        return adapted.train()  # as everything that a Trainer is given

    def network_mismatch(self, checkpoint: dict[str, Any], net: nn.Module) -> str | None:
        """See :meth:`ToyModule.misfit`; of a backbone only what was trained is in a checkpoint."""
        if self.backbone is None:
            return super().network_mismatch(checkpoint, net)
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
        return require_data(self.trainer.datamodule, TextData)  # type: ignore[attr-defined]

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

    # training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW of the supervised phase, and AdamW of the policy gradient."""

        def adamw(supervised: bool, lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
            chosen = [p for m in self.policies for _, p in self.parameters_of(m, supervised)]
            return torch.optim.AdamW(chosen, lr=lr, betas=betas, weight_decay=self.weight_decay)

        return adamw(True, self.warm_lr, (0.9, 0.999)), adamw(False, self.lr, self.betas)

    def on_train_start(self) -> None:
        """See :meth:`ToyModule.on_train_start`; the supervised rate is set at every step."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["weight_decay"] = self.weight_decay
        for group in self.trainer.optimizers[1].param_groups:
            group.update(lr=self.lr, betas=self.betas)
        if self.trainer.max_steps <= self.warm_steps and self.trainer.is_global_zero:
            note(
                f"the policy gradient will not begin: --trainer.max_steps {self.trainer.max_steps} are all imitation, "
                f"with --model.warm_steps {self.warm_steps}"
            )

    def supervised_rate(self, step: int) -> float:
        """Return the learning rate of supervised step ``step``."""
        return self.warm_lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / self.warm_steps)

    def rate_at(self, step: int) -> float | None:
        """See :meth:`ToyModule.rate_at`: the supervised rate changes."""
        if not self.warm_steps:
            return None
        return self.supervised_rate(step) if step < self.warm_steps else self.lr

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
        values = torch.tensor(list(seen.values()), dtype=torch.float64, device=self.device)  # NCCL sums on GPUs alone
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

    def extras_mismatch(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """See :meth:`ToyModule.extras_mismatch`: responses that more steps are to be taken on; a test reads none."""
        if not resumes:
            return ""
        if "responses" not in toy:
            asked = toy["config"]["model"]["init_args"]  # what it was trained with; to go on with may be something else
            k = step - asked.get("warm_steps", self.warm_steps)
            due = k > 0 and k % (asked.get("rollouts") or {}).get("inner_steps", 1)
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
        self.batches = []
        for found in checkpoint["toy"].get("responses", []) if self._trainer is not None and self.in_training else []:
            rows = rows_of(found["prompt"], self.trainer.global_rank, self.trainer.world_size)
            self.batches.append(PolicyBatch.taken_up(found, rows, self.rollouts.micro_batch))

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

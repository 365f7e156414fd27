"""The training of update_entropy's policies: imitation of worked solutions, then Dr. GRPO, each with its own AdamW."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_toys.errors import note, notes_held, require
from lightning_toys.training.checkpoint_format import mismatches
from lightning_toys.training.configuration import require_data
from lightning_toys.training.denormals import denormals_flushed
from lightning_toys.training.loader import Block, DrawnBlock
from lightning_toys.training.noise import keyed_torch
from lightning_toys.training.results import Report
from lightning_toys.update_entropy.checkpoints import (
    check_temperature,
    load_adapter,
    load_backbone,
    resolve_backbone,
)
from lightning_toys.update_entropy.data import EXTRA_TOKENS, TextData
from lightning_toys.update_entropy.estimators import entropy
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.losses import ScoredResponses
from lightning_toys.update_entropy.objective import Objective, ResponseWeights
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.policy import TinyPolicy, is_adapter
from lightning_toys.update_entropy.policy_inference import PolicyInference
from lightning_toys.update_entropy.reference import load_reference
from lightning_toys.update_entropy.rollouts import stop_tokens
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.training import (
    RESPONSES_FORMAT,
    PolicyBatch,
    PolicyStepMetrics,
    Rollouts,
    concatenate_ranks,
    policy_gradient,
    responses_mismatch,
    rows_of_rank,
    sample_rollouts,
    set_clipped_gradients,
    supervised_loss,
)

LR_WARMUP_STEPS = 50  # supervised steps over which the learning rate rises linearly


class PolicyModule(PolicyInference):
    """Policies, a language model for each seed, trained one after the other within a step.

    Attributes:
        policy: the language model and its adapter.
        rollouts: how responses are sampled.
        plan: of the probe; here, for the kind of entropy.
        warm_steps: supervised steps before the policy gradient's.
        warm_lr: their learning rate, which rises for :data:`LR_WARMUP_STEPS` steps and falls to 0 at the last.
        betas: decay rates of AdamW's two moments in the policy gradient.
        objective: the policy gradient's loss.
        eval_prompts: prompts of a validation, one response each.
        backbone: a pretrained model in the place of the tiny one.
        adapter: folder of a peft adapter to start from.
        batches: of each replica, the responses of the current policy-gradient steps.
        loaded_optimizer_states: of a checkpoint, or of the last training that ended.
        reference: of the KL penalty, a model or an adapter's folder; None: the policies without their adapters.
        loaded_backbone: once it has been read; in a list, since a submodule would be in checkpoints beside the net.
        loaded_reference: likewise.
    """

    experiment = "update_entropy"
    policy: TinyPolicy
    rollouts: Rollouts
    plan: Plan
    warm_steps: int
    warm_lr: float
    betas: tuple[float, float]
    objective: Objective
    eval_prompts: int
    backbone: str | None
    adapter: str | None
    batches: list[PolicyBatch]
    loaded_optimizer_states: list[dict[str, Any]]
    loaded_backbone: list[nn.Module]
    reference: str | None
    loaded_reference: list[nn.Module]

    # building

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = require_data(data, TextData)
        if self.backbone is not None:
            data.bind_backbone(self.backbone)
            data.tokenizer.eos_token_id  # noqa: B018 - its files are read, and refused, before anything is written
            return {"vocabulary": 0, "positions": 0}  # the backbone has its own
        positions = data.max_prompt_length + data.max_response_length + EXTRA_TOKENS
        return {"vocabulary": data.tokenizer.vocab_size, "positions": positions}

    def build(self) -> nn.Module:
        """See :meth:`ToyModule.build`: one policy a replica."""
        net: Any = (
            self.loaded_backbone[0] if self.loaded_backbone else nn.ModuleList(map(self.build_policy, self.seeds))
        )
        if self.backbone is not None:  # it takes long to load, and is built twice
            self.loaded_backbone = [net]
        if self.reference is not None and not self.loaded_reference:
            self.loaded_reference = [load_reference(self.reference, net[0], self.backbone)]
        built: nn.Module = net
        return built

    def build_policy(self, seed: int) -> nn.Module:
        """Return a new policy of a replica, in train mode.

        Raises:
            ToyError: the backbone or the adapter cannot be read, or they do not fit each other.
        """
        if self.backbone is None:
            return self.policy.build(seed, self.sizes["vocabulary"], self.sizes["positions"])
        with notes_held():
            model = load_backbone(resolve_backbone(self.backbone), torch.get_default_dtype())
            if self.rollouts.stop_tokens is None:
                stop_tokens(model)  # refused here, before anything is written
            given = self.adapter
            adapted = self.policy.with_adapter(model, seed) if given is None else load_adapter(model, given)
        return adapted.train()  # as a Trainer expects of every module

    def reference_policy(self) -> nn.Module | None:
        """Return the reference of the KL penalty; None for the policies without their adapters."""
        return self.loaded_reference[0].to(self.device) if self.loaded_reference else None

    def network_mismatch(self, checkpoint: dict[str, Any], net: nn.Module) -> str | None:
        """See :meth:`ToyModule.network_mismatch`; of a backbone only what was trained is in a checkpoint."""
        if self.backbone is None:
            return super().network_mismatch(checkpoint, net)
        built = {f"net.{k}": v.shape for k, v in net.state_dict().items()}
        for name, value in checkpoint["state_dict"].items():
            if name.startswith("net.") and built.get(name) != value.shape:
                return f"it has {tuple(value.shape)} for {name}, where {built.get(name)} is wanted"
        return None

    @property
    def text_data(self) -> TextData:
        """The Trainer's data module."""
        return require_data(self.trainer.datamodule, TextData)  # type: ignore[attr-defined]

    def phase_parameters(self, model: nn.Module, supervised: bool) -> list[tuple[str, nn.Parameter]]:
        """Return names and parameters that a phase trains: all but the adapter, then the adapter if there is one."""
        has_adapter = self.policy.lora_rank > 0
        return [(n, p) for n, p in model.named_parameters() if not has_adapter or is_adapter(n) != supervised]

    def trained_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the names and parameters that any phase of this run trains."""
        both = self.phase_parameters(model, False)
        return both + (self.phase_parameters(model, True) if self.warm_steps else [])

    def set_trainable(self, supervised: bool) -> None:
        """Set ``requires_grad`` of what the phase trains, and of nothing else."""
        for model in self.policies:
            trained = {n for n, _ in self.phase_parameters(model, supervised)}
            for n, p in model.named_parameters():
                p.requires_grad_(n in trained)

    # training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW of the supervised phase, and AdamW of the policy gradient."""

        def adamw(supervised: bool, lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
            chosen = [p for m in self.policies for _, p in self.phase_parameters(m, supervised)]
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

    def supervised_lr(self, step: int) -> float:
        """Return the learning rate of supervised step ``step``, from 0: linear warm-up times linear decay."""
        return self.warm_lr * min(1.0, (step + 1) / LR_WARMUP_STEPS) * (1 - step / self.warm_steps)

    def rate_at(self, step: int) -> float | None:
        """See :meth:`ToyModule.rate_at`: the supervised rate changes."""
        if not self.warm_steps:
            return None
        return self.supervised_lr(step) if step < self.warm_steps else self.lr

    @denormals_flushed()
    def training_step(self, block: Block | DrawnBlock, batch_idx: int) -> None:
        """Take every optimiser step of the block."""
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        losses: list[Tensor] = []
        self.net.train()
        for step in range(block.start, block.stop):
            supervised = step < self.warm_steps
            self.set_trainable(supervised)
            optimizer = optimizers[0 if supervised else 1]
            chosen = [[p for _, p in self.phase_parameters(m, supervised)] for m in self.policies]
            if supervised:
                for group in optimizer.param_groups:
                    group["lr"] = self.supervised_lr(step)
                batch = block.batch(step)
                tokens, response = batch.columns
                parts = []
                for r, m in enumerate(self.policies):
                    with self.keyed_dropout(r, step):
                        parts.append(supervised_loss(m, tokens[r], response[r], batch.total))
                loss = torch.stack(parts)
                with self.without_autocast():
                    # not backward(): DDP's hooks would wait for the parameters of the other phase
                    gradients = list(torch.autograd.grad(loss.sum(), [p for ps in chosen for p in ps]))
            else:
                loss, gradients = self.policy_gradients(step, chosen)
            losses.append(loss.detach())
            with self.without_autocast():
                self.all_reduce_gradients(gradients)
                for ps in chosen:
                    set_clipped_gradients(ps, [gradients.pop(0) for _ in ps], self.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        self.finish_block(block, torch.stack(losses))

    def keyed_dropout(self, r: int, step: int) -> AbstractContextManager[None]:
        """Return the context in which replica r's dropout at a step is its own: not the process's history."""
        return keyed_torch(self.seeds[r], step, f"dropout/{self.trainer.global_rank}", self.device)

    def all_reduce_gradients(self, gradients: list[Tensor]) -> None:
        """Sum the ranks' parts of the gradients, in place, in one message."""
        if self.trainer.world_size == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        for g, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))

    def step_weights(self, sequences: Sequences) -> ResponseWeights:
        """Return what this rank's responses weigh in averages over all ranks' together."""
        local = (sequences.prompt_index, sequences.lengths, sequences.rewards)
        parts: list[Any] = [local] * self.trainer.world_size
        if len(parts) > 1:
            torch.distributed.all_gather_object(parts, local)
        whole = ScoredResponses(*(list(chain(*columns)) for columns in zip(*parts, strict=True)))
        first = sum(len(part[0]) for part in parts[: self.trainer.global_rank])
        return self.objective.response_weights(whole).take(slice(first, first + len(sequences)))

    def policy_gradients(self, step: int, chosen: list[list[nn.Parameter]]) -> tuple[Tensor, list[Tensor]]:
        """Return this rank's part of each replica's loss (R,), and the gradients of ``chosen``, by replica."""
        spec, k = self.rollouts, step - self.warm_steps
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        require(
            spec.prompts >= world_size, f"--model.rollouts.prompts: {spec.prompts} is not allowed on {world_size} ranks"
        )
        if k % spec.inner_steps == 0 or not self.batches:
            local = range(spec.prompts * rank // world_size, spec.prompts * (rank + 1) // world_size)
            first = step - k % spec.inner_steps
            rollouts = [
                sample_rollouts(
                    m,
                    self.text_data,
                    s,
                    first,
                    "train",
                    local,
                    spec.group,
                    spec.temperature,
                    spec.prompts,
                    spec.stop_tokens,
                    spec.permute_rewards,
                )
                for m, s in zip(self.policies, self.seeds, strict=True)
            ]
            self.batches = [PolicyBatch.split(x, spec.micro_batch) for x in rollouts]
            self.net.train()
        results = []
        for r, (m, ps, b) in enumerate(zip(self.policies, chosen, self.batches, strict=True)):
            with self.keyed_dropout(r, step):
                weights, reference = self.step_weights(b.sequences), self.reference_policy()
                results.append(policy_gradient(m, ps, b, spec.temperature, self.objective, weights, reference))
        names = [f.name for f in fields(PolicyStepMetrics) if f.name != "kl" or self.objective.beta]
        rows = [[getattr(metrics, name) for _, _, metrics in results] for name in names]
        values = torch.tensor(rows, dtype=torch.float64, device=self.device)  # NCCL sums on GPUs alone
        if world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        self.write_scalars({f"train/{n}": v for n, v in zip(names, values, strict=True)}, step + 1)
        return torch.stack([loss for loss, _, _ in results]), [g for _, gs, _ in results for g in gs]

    def check_finite_weights(self) -> None:
        """See :meth:`ToyModule.check_finite_weights`; a replica here is a module."""
        bad = torch.tensor([any(not torch.isfinite(p).all() for p in m.parameters()) for m in self.policies])
        if bad.any():
            self.refuse_non_finite("weights are", bad, self.global_step)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_save_checkpoint`; the responses of steps still to come are kept too."""
        super().on_save_checkpoint(checkpoint)
        if self.backbone is not None:
            trained = {f"net.{r}.{n}" for r, m in enumerate(self.policies) for n, _ in self.trained_parameters(m)}
            kept = {n: w for n, w in checkpoint["state_dict"].items() if not n.startswith("net.") or n in trained}
            checkpoint["state_dict"] = kept
        k = self.global_step - self.warm_steps
        if k > 0 and k % self.rollouts.inner_steps:
            parts: list[Any] = [None] * self.trainer.world_size
            local = [b.to_checkpoint() for b in self.batches]
            if len(parts) > 1:
                torch.distributed.all_gather_object(parts, local)
            else:
                parts = [local]
            checkpoint["toy"]["responses"] = [concatenate_ranks(x) for x in zip(*parts, strict=True)]

    def extras_mismatch(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """See :meth:`ToyModule.extras_mismatch`: the responses of steps still to come, which a test does not read."""
        if not resumes:
            return ""
        if "responses" not in toy:
            stored = toy["config"]["model"]["init_args"]  # of the training so far; this run's may be others
            k = step - stored.get("warm_steps", self.warm_steps)
            needed = k > 0 and k % (stored.get("rollouts") or {}).get("inner_steps", 1)
            return "responses are missing" if needed else ""
        if why := next(mismatches(toy, {"responses": [RESPONSES_FORMAT]}), ""):
            return why
        if len(toy["responses"]) != len(self.seeds):
            return f"responses are of {len(toy['responses'])} replicas, there are {len(self.seeds)}"
        for r, found in enumerate(toy["responses"]):
            if why := responses_mismatch(found, self.sizes["vocabulary"]):
                return f"responses[{r}]{why}"
        return ""

    def on_train_end(self) -> None:
        """See :meth:`ToyModule.on_train_end`; the optimisers' states are remembered too, a probe reads them."""
        super().on_train_end()
        self.loaded_optimizer_states = [o.state_dict() for o in self.trainer.optimizers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_load_checkpoint`; keeps the optimisers' states, which `test` does not restore."""
        super().on_load_checkpoint(checkpoint)
        if self.backbone is not None and self._trainer is None:  # load_from_checkpoint warns of weights that are absent
            checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
        stored = checkpoint["toy"]["config"].get("model", {}).get("init_args", {}).get("rollouts") or {}
        check_temperature(stored.get("temperature"), self.rollouts.temperature)
        self.loaded_optimizer_states = checkpoint.get("optimizer_states", [])
        self.batches = []
        for found in checkpoint["toy"].get("responses", []) if self._trainer is not None and self.in_training else []:
            rows = rows_of_rank(found["prompt"], self.trainer.global_rank, self.trainer.world_size)
            self.batches.append(PolicyBatch.from_checkpoint(found, rows, self.rollouts.micro_batch))

    # evaluation

    def evaluation(self) -> Report:
        """Return mean reward, entropy and length of responses to the validation's prompts, the same at every step.

        Where the data give evaluation sequences, it is those; the reward is left out where it is not known.
        """
        metrics: dict[str, list[float]] = {"reward": [], "entropy": [], "length": []}
        spec, n, data = self.rollouts, self.eval_prompts, self.text_data
        for model, seed in zip(self.policies, self.seeds, strict=True):
            responses = data.given_evaluation(model) or sample_rollouts(
                model, data, seed, 0, "validation", range(n), 1, spec.temperature, n, spec.stop_tokens
            )
            metrics["reward"].append(sum(responses.rewards) / len(responses))
            metrics["entropy"].append(entropy(evaluate(model, responses, spec.temperature), self.plan.kind).value)
            metrics["length"].append(sum(responses.lengths) / len(responses))
        if not data.gives_rewards:
            del metrics["reward"]
        return Report(self.seeds, metrics)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Evaluate the policies on the validation's prompts."""
        self.last_report = self.evaluation()
        self.write_evaluation(self.last_report)

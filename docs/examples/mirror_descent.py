"""Which samplers reach a tilted distribution that is known exactly? Four of them, then one with a learned energy.

Run it as ``python mirror_descent.py [FOLDER]``; logs and checkpoints go below FOLDER (``lightning_logs``).
"""

import sys

import torch
from lightning.pytorch import Trainer

from lightning_toys.mirror_descent import (
    LateRamp,
    LearnedSampling,
    LinearGaussian,
    Settings,
    StateReward,
    TiltedSampling,
)
from lightning_toys.nets import Network
from lightning_toys.stats import format_estimate, mean_ci

folder = sys.argv[1] if len(sys.argv) > 1 else "lightning_logs"
torch.set_num_threads(1)  # small networks are faster on one thread
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

# (a, s') is Gaussian, and is tilted by exp(lambda Q(a)): the target has a closed form, and so has every error below.
data = LinearGaussian(alpha=1.0, sigma_sprime=0.5)
problem = {"reward": StateReward(r_a=1.5, r_s=1.0), "schedule": LateRamp(w_lo=0.3), "lambda_scale": 1.5}
seeds = [0, 1, 2]

# There is nothing to train: a test draws the samples and measures them.
samplers = ["importance", "mala", "pc_ula", "pc_mala"]
settings = Settings(K=20, mcmc_steps=50, particles=10)
model = TiltedSampling(seeds, samplers, **problem, chains=2000, settings=settings, sweep_max_refresh=0)
trainer = Trainer(default_root_dir=f"{folder}/tilted", **quiet)
(means,) = trainer.test(model, data, verbose=False)
metrics = model.last_report.metrics  # one value per seed; NAME@SAMPLER, and NAME alone is the first sampler's
for name in samplers:
    kl, cost = mean_ci(metrics[f"joint_kl@{name}"]), metrics[f"evaluations@{name}"][0]
    print(f"{name}: KL to the target {format_estimate(kl)} nats for {cost:.0f} evaluations per sample")
exact = model.last_report.references["exact_draws"]["joint_kl"]
print(f"as many exact draws: {exact:.4f} nats; {samplers[0]} has {means['test/joint_kl']:.4f}")
pairs = model.sample("mala", chains=1000, data=data)  # (seeds, chains, 2): a and s'; needs no Trainer
print(f"1000 samples of each seed by mala: the mean action is {format_estimate(mean_ci(pairs[..., 0].mean(1)))}")

# The same with an energy that is learned by denoising score matching.
learned = LearnedSampling(
    seeds, Network("film", hidden=16, activation="silu"), optimizer="muon", lr=5e-3, samplers=["mala"], **problem,
    chains=500, settings=Settings(mcmc_steps=20), sweep_max_refresh=0,
)  # fmt: skip
trainer = Trainer(max_steps=200, default_root_dir=f"{folder}/learned", **quiet)
trainer.fit(learned, data)
print(f"learned: relative error of the score {format_estimate(mean_ci(learned.last_report.metrics['score_error']))}")
trainer.test(learned, data, verbose=False)
for name, of in (("mala", "learned"), ("mala_exact", "exact")):
    kl = mean_ci(learned.last_report.metrics[f"joint_kl@{name}"])
    print(f"mala with the {of} energy: KL to the target {format_estimate(kl)} nats")
loaded = LearnedSampling.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
score = loaded(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), abar=0.5)  # (seeds, points, 2)
print("learned score at (1, 1), seed 0:", *(f"{x:.2f}" for x in score[0, 1]))

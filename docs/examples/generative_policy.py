"""Which policies keep several modes? A one-step flow and a SAC Gaussian on a target with three modes, then a bandit.

Run it as ``python generative_policy.py [FOLDER]``; logs and checkpoints go below FOLDER (``lightning_logs``).
"""

import sys

import torch
from lightning.pytorch import Trainer

from lightning_toys.generative_policy import (
    BanditData,
    BanditPolicy,
    Evaluation,
    GaussianPolicy,
    MeanFlowPolicy,
    MixtureData,
    ThreeModes,
    turns_to_states,
)
from lightning_toys.nets import Network
from lightning_toys.stats import mean_ci

folder = sys.argv[1] if len(sys.argv) > 1 else "lightning_logs"
torch.set_num_threads(1)  # small networks are faster on one thread


def trainer(name: str, steps: int) -> Trainer:
    """Return a Trainer on the CPU without bars and tables; its files go to a folder of that name."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_steps=steps, default_root_dir=f"{folder}/{name}", accelerator="cpu", **quiet)


# Three modes of standard deviation .1 in the square [-1, 1]^2, with the probabilities .39, .33 and .28.
data = MixtureData(ThreeModes(std=0.1), batch_size=128)
seeds = [0, 1, 2]
evaluation = Evaluation(samples=2000, pairs=500, nfe=[1, 8], test_nfe=[1, 8])  # a sample of each seed; cheap metrics
flow = {"form": "plain", "loss_power": 0.5, "optimizer": "muon", "lr": 3e-3, "lr_decay": "cosine"}
policies = {
    "gaussian": GaussianPolicy(seeds, lr=3e-3, evaluation=evaluation),
    "meanflow": MeanFlowPolicy(seeds, Network(hidden=64), evaluation=evaluation, **flow),
}
for name, policy in policies.items():
    run = trainer(name, 600)
    run.fit(policy, data)
    (means,) = run.test(policy, data, verbose=False)
    tv = mean_ci(policy.last_report.metrics["tv"])  # one value per seed
    print(f"{name}: total variation of the mode weights {tv.mean:.3f} ± {tv.half_width:.3f} over {tv.n} seeds")
    print(f"{name}: {means['test/off3']:.0%} of the actions are more than 3 sd from every mode")

# A checkpoint has the seeds and the networks; samples are (seeds, n, 2), keyed by the seed and `index`.
loaded = MeanFlowPolicy.load_from_checkpoint(run.checkpoint_callback.best_model_path, weights_only=True)
actions = loaded.sample(1000, index=1)
modes, _ = data.target.nearest(actions[0])
print("meanflow, seed 0: shares of the modes", *(f"{(modes == i).float().mean():.2f}" for i in range(3)))

# A contextual bandit with a known critic: the policy is asked for actions at states (cos, sin).
bandit, states = BanditData(), turns_to_states(torch.tensor([0.0, 0.25]))
agent = BanditPolicy("meanflow", seeds, critic="known", temperature=0.1, inner_steps=20, optimizer="muon", lr=3e-3)
trainer("bandit", 300).fit(agent, bandit)
regret, uniform = mean_ci(agent.last_report.metrics["regret"]), bandit.bandit.baselines["uniform"]["regret"]
print(f"bandit: regret {regret.mean:.2f} ± {regret.half_width:.2f}; uniform actions have {uniform:.2f}")
print("bandit, seed 0: actions at 0 and 90 degrees", *(f"({x:.2f}, {y:.2f})" for x, y in agent.act(states)[0]))

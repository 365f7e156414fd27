"""Which past to learn from, and which model of the world? The two halves of the bilevel experiment, a few seconds each.

Run it as ``python bilevel.py [FOLDER]``; logs and checkpoints go below FOLDER (``lightning_logs``). The second half
needs the extra: pip install "lightning-toys[control]".
"""

import sys

import torch
from lightning.pytorch import Trainer

from lightning_toys.bilevel import BilevelControl, DriftStream, ReplayData, Sine, Solver, WindowRegression
from lightning_toys.stats import format_estimate, mean_ci

folder = sys.argv[1] if len(sys.argv) > 1 else "lightning_logs"
torch.set_num_threads(1)  # small networks are faster on one thread
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

# Regression: a stream with a period of 20 steps; the weight of each of the last 25 steps is learned.
stream = DriftStream(window=25, drift=Sine(amplitude=10.0, omega=2 * torch.pi / 20), inner_points=32, outer_points=32)
for algorithm in ("funcbo", "uniform"):
    model = WindowRegression(algorithm, seeds=[0, 1, 2], hidden=32, inner_lr=1e-2, outer_lr=0.1)
    trainer = Trainer(max_steps=200, default_root_dir=f"{folder}/{algorithm}", **quiet)
    trainer.fit(model, stream)
    trainer.test(model, stream, verbose=False)
    loss = mean_ci(model.last_report.metrics["outer_loss"])  # one value per seed
    print(f"{algorithm}: loss over the last sixth of the stream {format_estimate(loss)}")
    if algorithm == "funcbo":
        lags = [int(largest[0]) for largest in model.last_report.arrays["largest_lags"]]  # of each seed
        print(f"funcbo: the largest weight is that of lag {lags[0]}, {lags[1]} and {lags[2]} in the three seeds")
        loaded = WindowRegression.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
        with torch.no_grad():
            y = loaded(torch.zeros(1, 5))  # (points, inputs) to (seeds, points, outputs)
        print("funcbo, seed 0: the prediction at x = 0 is", *(f"{v:.1f}" for v in y[0, 0]))
best = model.last_report.references["oracle"]["exact_loss"]
print(f"the best fixed weights would have {best:.2f}")

# Control: a model of CartPole is learned so that the values learned from it are good (funcbo).
agent = BilevelControl(
    "funcbo", seeds=[0, 1, 2, 3], lr=3e-3, inner_lr=3e-3, tau=0.05, solver=Solver(num_t_steps=2), eval_episodes=5,
    test_episodes=10,
)  # fmt: skip
replay = ReplayData(batch_size=64, init_steps=200, capacity=2000)
trainer = Trainer(max_steps=800, default_root_dir=f"{folder}/control", **quiet)  # steps of the environment
trainer.fit(agent, replay)
(means,) = trainer.test(agent, replay, verbose=False)
returns, random = mean_ci(agent.last_report.metrics["return"]), agent.last_report.references["random actions"]["return"]
print(f"control: return {format_estimate(returns)} in 10 episodes of each seed; random actions have {random:.1f}")
print(f"control: the mean episode has {means['test/length']:.0f} steps")
loaded = BilevelControl.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
observation = torch.tensor([[0.0, 0.0, 0.05, 0.0]])  # position, velocity, angle (rad), angular velocity
action = loaded.act(observation)  # (seeds, observations)
after = loaded.predict_next(observation, action)
print(f"control, seed 0: action {action[0, 0]}, predicted angle {after.next_state[0, 0, 2]:.3f} rad")

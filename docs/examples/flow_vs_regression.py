"""What do flows and regression do between 20 data points? Four seeds of each, trained in a few seconds.

Run it as ``python flow_vs_regression.py [FOLDER]``; logs and checkpoints go below FOLDER (``lightning_logs``).
"""

import sys

import torch
from lightning.pytorch import Trainer

from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData, Trigonometric
from lightning_toys.nets import Network
from lightning_toys.stats import mean_ci

folder = sys.argv[1] if len(sys.argv) > 1 else "lightning_logs"
torch.set_num_threads(1)  # small networks are faster on one thread

# The function to learn, and 20 of its points. Put your own f in by a subclass of
# lightning_toys.flow_vs_regression.Target; the notebook of this experiment has one.
data = InterpolationData(Trigonometric(components=2), num_train=20, num_eval=200)

for mode in ("regression", "flow"):
    # One network for each seed; all are trained at once, as one batched network. A step's batch has all 20 points here.
    model = FlowVsRegression(mode, seeds=[0, 1, 2, 3], network=Network(hidden=64))
    trainer = Trainer(
        max_steps=600,  # optimiser steps; max_epochs counts passes over the points
        default_root_dir=f"{folder}/{mode}",
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    # last_report has one value per seed, here of the last validation; a flow is read out by one Euler step in it.
    rmse = mean_ci(model.last_report.metrics["l2"])
    print(f"{mode}: RMSE {rmse.mean:.3f} ± {rmse.half_width:.3f} (half of the 95 % interval over {rmse.n} seeds)")

    # A test reads the network out in further ways; it returns the means over the seeds.
    (means,) = trainer.test(model, data, verbose=False)
    print(f"{mode}: the test's mean RMSE is {means['test/l2']:.3f}")
    if mode == "flow":
        for steps in (1, 4, 9):
            error = mean_ci(model.last_report.metrics[f"l2@zeros/euler-{steps}"])
            print(f"flow: RMSE {error.mean:.3f} ± {error.half_width:.3f} with {steps} Euler steps")
baselines = model.last_report.references
print(f"straight lines between the points: RMSE {baselines['linear']['l2']:.3f}")

# Any checkpoint can be loaded and asked at points of your own: (points, 1) to (seeds, points, outputs).
loaded = FlowVsRegression.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
c = torch.tensor([[0.25], [0.5]])
with torch.no_grad():
    predictions = loaded(c)
print(f"f(0.25) = {data.target(c)[0, 0]:.2f}; predicted by the seeds:", *(f"{p:.2f}" for p in predictions[:, 0, 0]))

"""What does one AdamW step do to a language model's entropy? A tiny model, a few steps, and the probe of the next.

Run it as ``python update_entropy.py [FOLDER]``; logs, checkpoints and the probe's tables go below FOLDER
(``lightning_logs``). Needs the extra: pip install "lightning-toys[language]".
"""

import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_toys.stats import format_estimate, mean_ci
from lightning_toys.update_entropy import (
    ArithmeticData,
    Plan,
    Rollouts,
    TinyPolicy,
    UpdateEntropy,
    UpdateEntropyCallback,
)

folder = sys.argv[1] if len(sys.argv) > 1 else "lightning_logs"
torch.set_num_threads(1)  # small networks are faster on one thread

data = ArithmeticData(digits=1, batch_size=32)  # "7+5=" is answered by "7+5=12;12"
model = UpdateEntropy(
    seeds=[0, 1, 2],  # a language model each
    policy=TinyPolicy(hidden=32, layers=1, heads=2, lora_rank=4),
    rollouts=Rollouts(prompts=8, group=4),
    warm_steps=120,  # imitation; then Dr. GRPO
    warm_lr=2e-2,
    eval_prompts=32,
    # what the test does: the next step's batch of 4 prompts, its effect measured on 128 others
    plan=Plan(prompts=4, eval_prompts=128, eval_group=1, etas=[1e-2], per_sequence=False, counterfactuals=False),
)
# The callback predicts a step's change of entropy before it is taken, and measures it afterwards. It works with any
# LightningModule that steps a causal language model by AdamW.
watch = UpdateEntropyCallback(first_step=120, every_n_steps=4, prompts=16, measure_prompts=32)
trainer = Trainer(
    max_steps=128,
    callbacks=[watch],
    logger=CSVLogger(folder, name="update_entropy"),
    default_root_dir=folder,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, data)
trained = model.last_report.metrics
reward, entropy = (format_estimate(mean_ci(trained[name])) for name in ("reward", "entropy"))
print(f"reward {reward}, entropy {entropy} nats per token")

(means,) = trainer.test(model, data, verbose=False)
for seed, probe in zip(model.seeds, model.probe_results, strict=True):
    found = probe.evaluations[0]
    slope, error = found.derivatives["full"]
    change = found.changes["full"][1e-2].change
    print(f"seed {seed}: dH/d eta {slope:.3f} ± {error:.3f} (standard error); predicted for a step of .01 "
          f"{1e-2 * slope:.5f}, measured {change.value:.5f} ± {change.se:.5f} nats per token")  # fmt: skip
print(f"mean dH/d eta {means['test/slope']:.3f}, of which momentum {means['test/slope_momentum']:.3f}")

# Any checkpoint can be loaded and asked.
loaded = UpdateEntropy.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
prompts = ["7+5=", "2+2="]
for seed, found in zip(loaded.seeds, loaded.generate([data.tokenizer.encode(p) for p in prompts], 12), strict=True):
    answers = [data.tokenizer.decode(response) for response in found.responses]
    print(f"seed {seed}:", *(f"{p} {a}" for p, a in zip(prompts, answers, strict=True)))

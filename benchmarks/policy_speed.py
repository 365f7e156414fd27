"""Speed of generative_policy: MeanFlow training beside an eager PyTorch loop, the recipe's parts, and sampling.

    python benchmarks/policy_speed.py [--quick] [--write]

Rows of the first table, for each width (three hidden SiLU layers, 256 pairs a step, the three-mode target, half of the
rows with r < t, tangent e - x, loss |error|^2 / (|error|^2 + 0.001)^0.5, AdamW at a constant rate, one CPU thread):

- eager: MeanFlow as its implementations write it. ``nn.Linear`` layers of [z, t - r, t]; samples, noise and times
  drawn by torch in the loop, a random mask for r = t; ``torch.func.jvp`` of the network for all rows, the target
  detached; zero_grad, backward, ``torch.optim.AdamW`` with its defaults (not fused), ``loss.item()`` each step. It
  writes nothing down.
- fit, R replicas: ``lightning_toys.cli.main(["fit", "-c", "configs/generative_policy/meanflow.yaml", ...])`` with the
  options in ``LIKE_EAGER``, in this process, from one Trainer batch to another: keyed draws, finiteness checks,
  metrics.csv and TensorBoard every 100 steps, and all that the Trainer does between. Start-up, validation and figures
  are left out.

The second table takes the shipped recipe as it stands (4 replicas, 6 residual layers of 128, Muon, optimal transport in
groups of 64, tangent u(z, t, t)) and changes one part at a time. The third draws actions in chunks of 16384, without
gradients, from one network of the recipe's size with random weights: one step, with its spread added as the policy adds
it, and 64 Euler steps through torchdiffeq. Only one chunk is drawn by 64 steps, and its time scaled to as many actions.

Time is CPU time of the whole process (``time.process_time``). The measurements are interleaved: one round takes each
row of a table once, ratios are taken within a round, and the tables give medians and ranges over the rounds. All rows
share ``fit``'s allocator setting (``lightning_toys.training.allocator``), which the loop would not have on its own.
With a CUDA device a fourth table gives wall time of `fit` there.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from measuring import WARM, StepClock, arguments, fit, gpu_wall_clock, report, spread
from torch import Tensor, nn

from lightning_toys.generative_policy.flow_ode import flow_sample
from lightning_toys.generative_policy.meanflow import AverageVelocity, Preconditioned, sample
from lightning_toys.generative_policy.mixture import ThreeModes
from lightning_toys.nets import Network
from lightning_toys.training.allocator import keep_freed_memory

RECIPE = "generative_policy/meanflow.yaml"
BATCH, LAYERS, STD, SHARE, POWER, FLOOR, LR = 256, 3, 0.02, 0.5, 0.5, 1e-3, 3e-3
ADAMW, INDEPENDENT = "--model.optimizer=adamw", "--data.coupling=Independent"
CONDITIONAL = "--model.tangent=conditional"
LIKE_EAGER = [
    *[ADAMW, INDEPENDENT, CONDITIONAL, "--model.form=plain", "--model.target_std=0"],
    *["--model.network.residual=false", f"--model.network.layers={LAYERS}", f"--data.batch_size={BATCH}"],
    *["--model.lr_decay=constant", "--model.clip_grad_norm=null"],
    *["--model.ema_decay=null", "--model.evaluation.weights=raw"],
]
REPLICAS = {"eager": 1, "fit, 1 replica": 1, "fit, 8 replicas": 8}
TARGETS = {"fit, 1 replica": {64: 1.5, 256: 1.5}, "fit, 8 replicas": {64: 2.5, 256: 1.3}}
PARTS = {
    "as shipped": [],
    "AdamW in place of Muon": [ADAMW],
    "Independent in place of OptimalTransport(64)": [INDEPENDENT],
    "tangent conditional in place of network": [CONDITIONAL],
    "all three": [ADAMW, INDEPENDENT, CONDITIONAL],
}
RECIPE_REPLICAS = 4
ACTIONS, CHUNK, ODE_STEPS = 10**6, 2**14, 64


def eager(width: int, steps: int) -> float:
    """Return CPU seconds per step of the usual MeanFlow loop."""
    torch.manual_seed(0)
    sizes = [4, *[width] * LAYERS]
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
    net = nn.Sequential(*hidden, nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    target = ThreeModes(STD)
    means, weights = target.means.float(), target.weights.float()

    def u_of(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(torch.cat([z, t - r, t], dim=-1))
        return out

    start = 0.0
    for step in range(WARM + steps):
        if step == WARM:
            start = time.process_time()
        x = means[torch.multinomial(weights, BATCH, replacement=True)] + STD * torch.randn(BATCH, 2)
        e = torch.randn_like(x)
        one, other = torch.rand(BATCH, 1), torch.rand(BATCH, 1)
        apart = torch.rand(BATCH, 1) < SHARE
        t = torch.where(apart, torch.maximum(one, other), one)
        r = torch.where(apart, torch.minimum(one, other), one)
        z, v = (1 - t) * x + t * e, e - x
        u, du = torch.func.jvp(u_of, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))[:2]
        square = (u - (v - (t - r) * du).detach()).square().sum(-1)
        loss = (square / (square.detach() + FLOOR) ** POWER).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.process_time() - start) / steps


def training(name: str, width: int, steps: int, few: int) -> float:
    """Return CPU seconds per step of a row of the first table; ``few`` steps where there are several replicas."""
    if name == "eager":
        return eager(width, steps)
    replicas = REPLICAS[name]
    options = [*LIKE_EAGER, f"--model.network.hidden={width}"]
    return fit(RECIPE, options, replicas, steps if replicas == 1 else few)


def training_table(widths: tuple[int, ...], rounds: int, steps: int, few: int) -> Iterator[str]:
    """Measure eager and `fit`, interleaved, and yield the table's lines."""
    taken: dict[int, list[dict[str, float]]] = {width: [] for width in widths}
    for _ in range(rounds):
        for width in widths:
            taken[width].append({name: training(name, width, steps, few) for name in REPLICAS})
    yield "| width | row | µs per step | µs per replica-step | times eager's speed, per replica | target |"
    yield "|---|---|---|---|---|---|"
    for width, found in taken.items():
        for name, replicas in REPLICAS.items():
            micro = statistics.median(f[name] for f in found) * 1e6
            faster = [replicas * f["eager"] / f[name] for f in found]
            target = ""
            if name in TARGETS:
                bound = TARGETS[name][width]
                target = f"≥ {bound:.1f}: {'met' if statistics.median(faster) >= bound else 'missed'}"
            ratio = spread(faster) if name != "eager" else "1"
            yield f"| {width} | {name} | {micro:.0f} | {micro / replicas:.0f} | {ratio} | {target} |"


def parts_table(rounds: int, steps: int) -> Iterator[str]:
    """Measure the shipped recipe and what is left without its parts, interleaved, and yield the table's lines."""
    taken = [
        {name: fit(RECIPE, options, RECIPE_REPLICAS, steps) * 1e6 / RECIPE_REPLICAS for name, options in PARTS.items()}
        for _ in range(rounds)
    ]
    yield f"| the shipped recipe, {RECIPE_REPLICAS} replicas | µs per replica-step | saved, µs per replica-step |"
    yield "|---|---|---|"
    for name in PARTS:
        saved = spread([f["as shipped"] - f[name] for f in taken], 0) if PARTS[name] else ""
        yield f"| {name} | {statistics.median(f[name] for f in taken):.0f} | {saved} |"


def recipe_network() -> AverageVelocity:
    """Return one replica of the recipe's network, weights as drawn."""
    net = Network(hidden=128, layers=6, activation="silu", residual=True).build([0], 2, 2, True, 3)
    return AverageVelocity(net, Preconditioned(ThreeModes(STD).scale), head=True)


@torch.no_grad()
def drawing(act: Callable[[Tensor], Tensor], n: int) -> float:
    """Return CPU seconds that it takes to draw n actions, noise included."""
    start = time.process_time()
    for first in range(0, n, CHUNK):
        act(torch.randn(1, min(CHUNK, n - first), 2))
    return time.process_time() - start


def sampling_table(rounds: int, n: int) -> Iterator[str]:
    """Measure one step and the ODE, interleaved, and yield the table's lines."""
    torch.manual_seed(0)
    net = recipe_network()

    def one_step(e: Tensor) -> Tensor:
        z, log_sigma = sample(net, e, 1)
        assert log_sigma is not None
        return torch.addcmul(z, log_sigma.exp(), torch.randn_like(z))

    def ode(e: Tensor) -> Tensor:
        return flow_sample(net.velocity, e, "euler", ODE_STEPS)

    drawing(one_step, CHUNK)  # the first call is slower
    taken = [(drawing(one_step, n), drawing(ode, CHUNK) * n / CHUNK) for _ in range(rounds)]
    number = f"{n:,}".replace(",", " ")
    yield f"| {number} actions | s | to one step |"
    yield "|---|---|---|"
    yield f"| one step | {spread([a for a, _ in taken])} | 1 |"
    ratios, note = [b / a for a, b in taken], f"timed on {CHUNK} actions, times {n / CHUNK:.1f}"
    yield f"| {ODE_STEPS} Euler steps ({note}) | {spread([b for _, b in taken])} | {spread(ratios)} |"


def gpu_table(steps: int) -> Iterator[str]:
    """Yield wall time of the recipe's `fit` on the GPU, and on the CPU where that does not take minutes."""
    yield "| the shipped recipe, wall time, ms per step | CPU, 1 thread | GPU | GPU, Independent coupling |"
    yield "|---|---|---|---|"
    StepClock.clock = gpu_wall_clock
    try:
        for replicas in (1, 16, 256):
            slow = replicas == 256  # optimal transport is solved on the host, and takes most of the time there
            n, takes = (WARM, 1) if slow else (steps, 3)
            cells = []
            for accelerator, options in (("cpu", []), ("gpu", []), ("gpu", [INDEPENDENT])):
                if slow and accelerator == "cpu":
                    cells.append("not taken")
                    continue
                found = [fit(RECIPE, options, replicas, n, accelerator) * 1e3 for _ in range(takes)]
                cells.append(f"{statistics.median(found):.2f}")
            yield f"| {replicas} replica{'s' if replicas > 1 else ''} | {' | '.join(cells)} |"
    finally:
        StepClock.clock = time.process_time


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    widths, rounds, steps, actions = ((64,), 1, 50, CHUNK) if options.quick else ((64, 256), 5, 200, ACTIONS)
    few = max(WARM, steps // 2)
    lines = [*training_table(widths, rounds, steps, few), "", *parts_table(rounds, few), ""]
    lines += sampling_table(rounds, actions)
    device = "Device: cpu."
    if torch.cuda.is_available():
        device = "Device: cpu; the last table names its own."
        lines += ["", *gpu_table(steps)]
    about = (
        f"{device} Medians of {rounds} interleaved rounds, with their range: {steps} steps each, {few} in rows of "
        f"several replicas. CPU time, {time.process_time():.0f} s in all."
    )
    report("policy_speed.py", "Policy speed", about, lines, options.write)


if __name__ == "__main__":
    main()

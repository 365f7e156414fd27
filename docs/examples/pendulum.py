"""A one-step policy in a plain actor-critic on gymnasium's Pendulum-v1.

Run it as ``python pendulum.py`` (some five CPU minutes); it needs gymnasium.
"""

import argparse
import copy
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import nn

from lightning_toys.generative_policy import PlainPolicy, sample_softmax
from lightning_toys.stats import format_estimate, mean_ci


def train(steps: int, kind: str = "meanflow", seed: int = 0) -> list[float]:
    """Return the return of each episode of a plain actor-critic on Pendulum-v1."""
    torch.manual_seed(seed)
    env, g = gymnasium.make("Pendulum-v1"), torch.Generator().manual_seed(seed)
    policy = PlainPolicy.build(kind, state_dim=3, action_dim=1, seeds=[seed])
    q = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
    slow = copy.deepcopy(q)
    optimizer = torch.optim.Adam([*policy.parameters(), *q.parameters()], lr=1e-3)
    memory, returns, total = [], [], 0.0
    state, _ = env.reset(seed=seed)
    for step in range(steps):
        with torch.no_grad():
            action = policy.act(torch.tensor(state)[None], seed=step)[0, 0]
            action = (action + 0.2 * torch.randn(1, generator=g)).clamp(-1, 1)
        after, reward, _, ended, _ = env.step(2 * action.numpy())
        memory.append((state, action.numpy(), [reward / 10], after))
        total, state = total + float(reward), after
        if ended:
            returns.append(total)
            total, (state, _) = 0.0, env.reset()
        if step < 200:
            continue
        rows = (memory[i] for i in torch.randint(len(memory), (128,), generator=g).tolist())
        s, a, r, s2 = (torch.tensor(np.array(x), dtype=torch.float32) for x in zip(*rows, strict=True))
        with torch.no_grad():
            goal = r + 0.98 * slow(torch.cat([s2, policy.act(s2, seed=step)[0]], 1))
            # a step of mirror descent: of 16 actions at each state one is kept, with probability exp(Q / temperature)
            many = s.repeat_interleave(16, 0)
            tried = policy.act(many, seed=steps + step)[0]
            tried = (tried + 0.2 * torch.randn(tried.shape, generator=g)).clamp(-0.99, 0.99)
            value = slow(torch.cat([many, tried], 1)).reshape(128, 16)
            kept = sample_softmax(value, 0.1, torch.rand(128, generator=g))
            better = tried.reshape(128, 16, 1)[torch.arange(128), kept]
        loss = (q(torch.cat([s, a], 1)) - goal).square().mean() + policy.fit_loss(better, s, step).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p, other in zip(slow.parameters(), q.parameters(), strict=True):
            p.data.lerp_(other.data, 0.01)
    return returns


def uniform(episodes: int, seed: int = 0) -> list[float]:
    """Return the return of episodes with uniform torques."""
    env, found = gymnasium.make("Pendulum-v1"), []
    env.action_space.seed(seed)
    for k in range(episodes):
        env.reset(seed=1000 * seed + k)
        found.append(sum(float(env.step(env.action_space.sample())[1]) for _ in range(200)))
    return found


def main() -> None:
    """Print the mean return of a policy's first and last ten episodes, and of uniform torques, over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["meanflow"], choices=["gaussian", "meanflow", "flow"])
    parser.add_argument("--steps", type=int, default=6000, help="200 an episode")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, help="where the table goes too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"uniform torques": [(np.mean(u), np.mean(u)) for u in (uniform(10, s) for s in args.seeds)]}
    for kind in args.kinds:
        returns = [train(args.steps, kind, seed) for seed in args.seeds]
        rows[kind] = [(np.mean(r[:10]), np.mean(r[-10:])) for r in returns]
    text = "| policy | first ten episodes | last ten episodes |\n|---|---:|---:|\n"
    for name, pairs in rows.items():
        first, last = (mean_ci(x) for x in zip(*pairs, strict=True))
        text += f"| {name} | {format_estimate(first)} | {format_estimate(last)} |\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

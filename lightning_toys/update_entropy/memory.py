"""What a probe keeps in memory, estimated and compared with what is free before anything is sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_toys.errors import ToyError, note
from lightning_toys.update_entropy.probe import Plan

GIB = 1 << 30
TOLD_FROM = 2 * GIB  # an estimate below is not worth a line
CGROUP = Path("/sys/fs/cgroup")


def probe_bytes(model: nn.Module, plan: Plan, world_size: int = 1) -> int:
    """Return about how many bytes of gradients a probe keeps at once; activations come on top.

    Each is as large as all trainable parameters: of every update sequence its gradient and its direction, and with
    counterfactuals the step without it; of every evaluation sequence of one batch, shared out over processes, its
    gradient; with counterfactuals four parts of the step without each prompt of U; AdamW's moments, the step's parts
    and other steps, twenty in all.

    Args:
        model: the policy.
        plan: of the probe.
        world_size: number of processes.
    """
    one = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    update, evaluation = plan.prompts * plan.group, plan.eval_prompts * plan.eval_group
    copies = 2 * update + -(-evaluation // world_size) + 20
    if plan.counterfactuals:
        copies += max(update, 4 * plan.prompts)
    return one * copies


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, None where the system does not say.

    Args:
        device: of the policy; of the CPU, the least of the machine's and of the process's cgroup.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))  # "max" is no number: no limit
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def check_memory(model: nn.Module, plan: Plan, world_size: int = 1) -> None:
    """Tell how much memory a probe takes where that is much, and refuse one that does not fit.

    Args:
        model: the policy, of which what is trained requires a gradient.
        plan: of the probe.
        world_size: number of processes.

    Raises:
        ToyError: less is free.
    """
    wanted, free = probe_bytes(model, plan, world_size), free_bytes(next(model.parameters()).device)
    update, evaluation = plan.prompts * plan.group, plan.eval_prompts * plan.eval_group
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"gradients of {evaluation} + {update} sequences by {trained:,} parameters take about {wanted / GIB:.1f} GiB"
    if free is not None and wanted > free:
        raise ToyError(
            f"--model.plan.eval_prompts: {plan.eval_prompts} is not allowed here: {what}, and {free / GIB:.1f} GiB are "
            "free; give fewer (or fewer --model.plan.prompts), --model.plan.counterfactuals false, or an adapter "
            "(--model.policy.lora_rank)"
        )
    if wanted >= TOLD_FROM:
        note(f"the probe's {what}")

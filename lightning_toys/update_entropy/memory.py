"""What a probe keeps in memory, estimated and compared with what is free before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lightning_toys.errors import ToyError, note
from lightning_toys.update_entropy.plan import Plan

GIB = 1 << 30
TOLD_FROM = 2 * GIB  # an estimate below is not worth a line
CGROUP = Path("/sys/fs/cgroup")
# what a probe holds beside the sequences' gradients, each as large as all that is trained: AdamW's two moments; the
# gradient; the step, its two parts and its gain; three sums of parts; of another step as many as of this one; h and
# what is taken of it; a direction, its gradient and the weights along it
COPIES = 20
# and where no gradient is kept: the moments; the gradient; a direction, the weights along it, and what is on its way
FEW = 6
OTHER_STATE = 2  # the moments of a counterfactual
AT_ONCE = 3  # of each further set of weights in a vectorised pass: its direction, the weights, and the stack of them


def trained_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters that require a gradient."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def probe_copies(
    update: int, evaluation: int, chunk: int, kept: bool, counterfactuals: bool = True, passes: int = 1
) -> int:
    """Return how many times what is trained a probe keeps at once.

    Args:
        update: sequences of U.
        evaluation: sequences of one batch E on one process.
        chunk: sequences of a batched reverse pass.
        kept: whether the gradient of each sequence is kept; else a few are held whatever the number of sequences.
        counterfactuals: whether the plan has steps of other settings.
        passes: weights of one vectorised forward pass.

    >>> probe_copies(16, 64, 32, True), probe_copies(16, 64, 32, False), probe_copies(16, 64, 32, False, False)
    (132, 8, 6)
    >>> probe_copies(16, 64, 32, False, False, passes=4)
    15
    """
    more = AT_ONCE * (passes - 1)
    if not kept:
        return FEW + (OTHER_STATE if counterfactuals else 0) + more
    return COPIES + update + evaluation + min(chunk, max(update, evaluation)) + more


def probe_bytes(
    model: nn.Module,
    plan: Plan,
    world_size: int = 1,
    update: int | None = None,
    evaluation: int | None = None,
    kept: bool = True,
) -> int:
    """Return about how many bytes of gradients a probe keeps at once; activations come on top.

    Args:
        model: the policy.
        plan: of the probe.
        world_size: number of processes, over which the evaluation sequences are shared out.
        update: sequences of U; None for the plan's.
        evaluation: sequences of one batch E; None for the plan's.
        kept: whether the gradient of each sequence is kept.
    """
    n_u = plan.prompts * plan.group if update is None else update
    n_e = plan.eval_prompts * plan.eval_group if evaluation is None else evaluation
    copies = probe_copies(
        n_u, -(-n_e // world_size), plan.grad_chunk_size, kept, plan.counterfactuals, plan.directions_per_pass
    )
    return trained_bytes(model) * copies


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


def check_memory(
    model: nn.Module, plan: Plan, world_size: int = 1, update: int | None = None, evaluation: int | None = None
) -> bool:
    """Return whether the gradient of each sequence is kept, tell what that takes, and refuse what does not fit.

    Args:
        model: the policy, of which what is trained requires a gradient.
        plan: of the probe.
        world_size: number of processes.
        update: sequences of U; None for the plan's.
        evaluation: sequences of one batch E; None for the plan's.

    Raises:
        ToyError: less is free than the way that the plan asks for takes, or than either.
    """
    n_u = plan.prompts * plan.group if update is None else update
    n_e = plan.eval_prompts * plan.eval_group if evaluation is None else evaluation
    free = free_bytes(next(model.parameters()).device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept, anew = (probe_bytes(model, plan, world_size, n_u, n_e, way) for way in (True, False))
    fits = free is None or kept <= free
    keep = fits if plan.keep_gradients is None else plan.keep_gradients
    whole = f"gradients of {n_e} + {n_u} sequences by {trained:,} parameters take about {kept / GIB:.1f} GiB"
    few = f"without kept gradients, a probe by {trained:,} parameters takes about {anew / GIB:.1f} GiB"
    if free is not None and (kept if keep else anew) > free:
        advice = "an adapter (--model.policy.lora_rank), or a smaller model"
        if keep:
            advice = f"--model.plan.keep_gradients null or false ({anew / GIB:.1f} GiB), fewer sequences, or an adapter"
        raise ToyError(
            f"--model.plan.keep_gradients: {str(plan.keep_gradients).lower().replace('none', 'null')} is not allowed "
            f"here: {whole if keep else few}, and {free / GIB:.1f} GiB are free; give {advice}"
        )
    if not keep and plan.keep_gradients is None:
        note(f"the probe's {whole}, which is more than is free: none is kept; {few}, and more time")
    elif (kept if keep else anew) >= TOLD_FROM:
        note(f"the probe's {whole}" if keep else f"the probe: {few}")
    return keep


def memory_table(parameters: dict[str, int], plan: Plan, element: int = 4) -> Iterator[str]:
    """Yield the lines of a Markdown table: what a plan takes, for models of several numbers of trained parameters.

    Args:
        parameters: trained, by the model's name.
        plan: of the probe.
        element: bytes of one.

    >>> list(memory_table({"tiny": 1 << 28}, Plan(prompts=4, group=4, eval_prompts=64, eval_group=1)))[-1]
    '| tiny | 268,435,456 | 1.0 | 132.0 | 8.0 |'
    """
    n_u, n_e = plan.prompts * plan.group, plan.eval_prompts * plan.eval_group
    yield f"| trained | parameters | GiB | gradients of {n_e} + {n_u} sequences kept, GiB | none kept, GiB |"
    yield "|---|---:|---:|---:|---:|"
    for name, count in parameters.items():
        one = count * element / GIB
        both = (
            one * probe_copies(n_u, n_e, plan.grad_chunk_size, kept, plan.counterfactuals, plan.directions_per_pass)
            for kept in (True, False)
        )
        yield f"| {name} | {count:,} | {one:.1f} | " + " | ".join(f"{x:.1f}" for x in both) + " |"

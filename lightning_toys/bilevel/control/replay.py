"""A replay buffer for each replica, and samples from it without a generator's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.environments import Transition
from lightning_toys.errors import bounded, require
from lightning_toys.training.noise import NoiseStream


class Batch(NamedTuple):
    """Transitions drawn with replacement, each replica's from its own buffer.

    Attributes:
        observation: (R, B, obs).
        action: (R, B), int64.
        reward: (R, B).
        next_observation: (R, B, obs).
        not_terminated: (R, B); 0 where the task was over, 1 else, at a time limit too.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    not_terminated: Tensor


def uniform_float64(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniforms on [0, 1) in float64.

    Single precision has 2^24 of them: of 200,000 rows some would be drawn 1.2 % more often than others. In float64,
    floor(u n) < n for every n: u <= 1 - 2^-53, and n (1 - 2^-53) is nearer to the number before n than to n.
    """
    return generator.random(shape)


class ReplayBuffer(nn.Module):
    """A ring buffer of the last ``capacity`` transitions of each replica.

    One buffer ``rows`` (R, capacity, 2 obs + 3) holds observation, next observation, reward, action and not_terminated
    side by side: a step is one write and a draw one gather, on a GPU one transfer and one kernel. (As small integers
    the last two would save a tenth of the bytes.) A state dict holds the filled rows only.

    Args:
        seeds: one seed a replica; they key the draws.
        observation_size: length of an observation.
        capacity: transitions that a replica keeps.

    Raises:
        ToyError: the capacity is below 1, or a loaded buffer has another one.

    >>> buffer = ReplayBuffer([0], observation_size=1, capacity=2)
    >>> for t in range(3):
    ...     x = torch.full((1, 1), float(t))
    ...     buffer.add(x, torch.tensor([0]), torch.tensor([1.0]), x + 1, torch.tensor([False]))
    >>> buffer.transitions.observation.flatten()
    tensor([2., 1.])
    >>> buffer.sample(step=0, batch=4).observation.shape
    torch.Size([1, 4, 1])
    """

    rows: Tensor

    def __init__(self, seeds: Sequence[int], observation_size: int, capacity: int) -> None:
        super().__init__()
        bounded("--data.capacity", capacity, 1)
        self.seeds, self.observation_size, self.capacity = tuple(seeds), observation_size, capacity
        self.added = 0
        # zeros are pages that the system hands out as they are written to
        self.register_buffer("rows", torch.zeros(len(self.seeds), capacity, 2 * observation_size + 3))
        self._row_offsets = torch.empty(0)  # of each replica, in the flattened buffer
        self._streams: dict[tuple[str, int], NoiseStream] = {}

    @property
    def size(self) -> int:
        """Transitions that each replica can draw from."""
        return min(self.added, self.capacity)

    @property
    def transitions(self) -> Batch:
        """The filled part of the buffer, (R, size, ...); all but ``action`` are views."""
        return self._to_batch(self.rows[:, : self.size])

    def add(
        self,
        observation: Tensor | np.ndarray,
        action: Tensor | np.ndarray,
        reward: Tensor | np.ndarray,
        next_observation: Tensor | np.ndarray,
        terminated: Tensor | np.ndarray,
    ) -> None:
        """Add one transition of each replica; the oldest is overwritten.

        Args:
            observation: (R, obs).
            action: (R,).
            reward: (R,).
            next_observation: (R, obs).
            terminated: (R,).
        """
        if isinstance(observation, Tensor):
            columns = (next_observation, reward, action, terminated)
            o, n, *rest = (torch.as_tensor(x, dtype=self.rows.dtype) for x in (observation, *columns))
            r, a, t = rest
            row = torch.cat([o, n, torch.stack([r, a, 1 - t], dim=1).to(o.device)], dim=1)
        else:
            size = self.observation_size
            packed = np.empty((len(self.seeds), 2 * size + 3), dtype=np.float32)
            packed[:, :size] = observation
            packed[:, size : 2 * size] = next_observation
            packed[:, -3] = reward
            packed[:, -2] = action
            packed[:, -1] = 1 - np.asarray(terminated, dtype=np.float32)
            row = torch.from_numpy(packed)
        self.rows[:, self.added % self.capacity] = row
        self.added += 1

    def store(self, transition: Transition) -> None:
        """Add a step of R x copies environments, copy after copy."""
        o, a, r, n, terminated, _ = transition
        for c in range(a.shape[1]):
            self.add(o[:, c], a[:, c], r[:, c], n[:, c], terminated[:, c])

    def sample(self, step: int, batch: int, stream: str = "replay") -> Batch:
        """Draw ``batch`` transitions a replica: a function of (seeds, step, stream, batch) and of what is stored."""
        assert self.added, "nothing to draw from"
        key = (stream, batch)
        if key not in self._streams:
            self._streams[key] = NoiseStream(self.seeds, stream, (batch,), uniform_float64)
        rows, replicas = self.rows, len(self.seeds)
        device = torch.device("cpu") if rows.device.type == "mps" else rows.device  # mps has no float64
        u = self._streams[key].at(step, torch.empty(0, dtype=torch.float64, device=device))
        index = (u * self.size).long().to(rows.device)  # u >= 0: cutting off is floor
        if self._row_offsets.device != rows.device or self._row_offsets.numel() != replicas:
            self._row_offsets = torch.arange(replicas, device=rows.device)[:, None] * self.capacity
        drawn = rows.flatten(0, 1).index_select(0, (index + self._row_offsets).flatten())
        return self._to_batch(drawn.view(replicas, batch, rows.shape[2]))

    def _to_batch(self, rows: Tensor) -> Batch:
        o, n = rows[..., : self.observation_size], rows[..., self.observation_size : -3]
        return Batch(o, rows[..., -2].long(), rows[..., -3], n, rows[..., -1])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # a copy: torch.save writes all of the memory that a view belongs to
        destination[f"{prefix}rows"] = self.rows[:, : self.size].clone()
        destination[f"{prefix}added"] = torch.tensor(self.added)
        destination[f"{prefix}capacity"] = torch.tensor(self.capacity)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [f"{prefix}{n}" for n in ("rows", "added", "capacity")]
        absent = [n for n in names if n not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        rows, added, capacity = (state_dict[n] for n in names)
        stored = int(capacity)
        require(
            stored == self.capacity,
            f"--data.capacity: {self.capacity} is not allowed; the stored replay keeps {stored} transitions, give that",
        )
        expected = (len(self.seeds), min(int(added), stored), self.rows.shape[2])
        if tuple(rows.shape) != expected:
            error_msgs.append(f"size mismatch for {names[0]}: {tuple(rows.shape)}, where {expected} is wanted")
            return
        self.added = int(added)
        with torch.no_grad():
            self.rows[:, : self.size] = rows
            self.rows[:, self.size :] = 0

"""Data-parallel training over the processes that torchrun started; one process needs none of it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from tests.reference.dspark_torch import Weights


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(weights: Weights) -> None:
    """Replace every gradient by its mean over the processes."""
    if not dist.is_initialized():
        return
    gradients = [w.grad for w in weights.values() if w.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Schedule:
    """Progress of a training in [0, 1]: by steps, or by time where a limit in minutes comes first.

    With a limit the number of steps depends on the machine, so the result is not reproducible to the bit.
    """

    def __init__(self, n_steps: int, minutes: float | None) -> None:
        self.n_steps, self.minutes = n_steps, minutes
        self.began = time.monotonic()

    def progress(self, step: int) -> float:
        """Progress before this step, the same on all processes; 1 or more ends the training."""
        value = step / self.n_steps
        if self.minutes is not None:
            value = max(value, (time.monotonic() - self.began) / (60 * self.minutes))
        if dist.is_initialized():
            shared = torch.tensor([value])
            dist.broadcast(shared, 0)
            value = float(shared)
        return value

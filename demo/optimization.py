"""How the demo models' weights are changed: Muon for matrices, AdamW for the rest, one schedule for both.

Knows nothing of models' shapes, of corpora or of losses: it is given a model whose gradients are there.
Called by the training scripts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rates:
    """The schedule of a training.

    Args:
        num_steps, max_minutes: whichever is over first ends it.
        matrix_lr, vector_lr: peak learning rates of Muon and AdamW.
        warmup_steps: steps until they are reached.
        decay_share: how much of training has a falling rate.
    """

    num_steps: int
    max_minutes: float
    matrix_lr: float
    vector_lr: float
    warmup_steps: int
    decay_share: float


@dataclass(slots=True)
class Progress:
    """How far training is: the share of its steps or of its time, whichever is more; where time runs out first the
    schedule is cut short, and the result is the machine's."""

    rates: Rates
    step: int = 0
    share: float = 0.0
    minutes: float = 0.0
    _started: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self.share = 0.0 if self.rates.num_steps else 1.0

    def advance(self) -> None:
        """Counts a step."""
        self.step += 1
        self.minutes = (time.monotonic() - self._started) / 60
        self.share = max(self.step / self.rates.num_steps, self.minutes / self.rates.max_minutes)

    def rate(self) -> float:
        """What the peak learning rates are multiplied by: up over the first steps, level, down to nothing."""
        return min((self.step + 1) / self.rates.warmup_steps, (1 - self.share) / self.rates.decay_share, 1.0)


class Optimizer:
    """Weights kept in float32 for a model that computes in bfloat16, as it is served: on a CPU three times as fast."""

    def __init__(
        self,
        model: torch.nn.Module,
        rates: Rates,
        matrix_scale: Callable[[str, torch.nn.Parameter], float],
        max_gradient_norm: float | None = None,
    ) -> None:
        """Casts the model to bfloat16; parameters that need no gradient stay as they are.

        Args:
            matrix_scale: by name and parameter, which share of the rate Muon changes it with; 0 leaves it to AdamW.
            max_gradient_norm: longer gradients, of all weights together, are shortened to it.
        """
        self._model, self._rates, self._max_gradient_norm = model, rates, max_gradient_norm
        learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._kept = {name: parameter.detach().clone().requires_grad_() for name, parameter in learnt.items()}
        model.to(torch.bfloat16)
        scales = {name: matrix_scale(name, parameter) for name, parameter in learnt.items()}
        matrices = [
            {"params": [p for name, p in self._kept.items() if scales[name] == scale], "scale": scale}
            for scale in sorted(set(scales.values()) - {0.0})
        ]
        others = [{"params": [p for name, p in self._kept.items() if scales[name] == 0.0], "scale": 1.0}]
        self._muon = torch.optim.Muon(matrices, lr=rates.matrix_lr, weight_decay=0.01, momentum=0.95)
        self._adamw = torch.optim.AdamW(others, lr=rates.vector_lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, rate: float) -> None:
        """One step at this share of the peak rates: gradients go to the kept weights, which come back rounded."""
        learnt = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        for name, parameter in learnt.items():
            assert parameter.grad is not None
            self._kept[name].grad = parameter.grad.float()
            parameter.grad = None
        if self._max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._kept.values(), self._max_gradient_norm)
        for optimizer, peak in ((self._muon, self._rates.matrix_lr), (self._adamw, self._rates.vector_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate * group["scale"]
            optimizer.step()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in learnt.items():
                parameter.copy_(self._kept[name])

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights kept in float32, by name, as they are now."""
        return {name: weight.detach() for name, weight in self._kept.items()}


def running_mean(mean: float, new: float, step: int) -> float:
    """The running mean of a loss, with a new one in it."""
    return new if step == 1 else 0.95 * mean + 0.05 * new

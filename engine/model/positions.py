"""Position embeddings by position: for decoders that count positions themselves instead of taking them.

Knows nothing of how the model makes them: its own module is asked once for all of them.
Put in the place of that module by model/flat_decoder.py (BART, mBART, Marian, Pegasus, M2M100 and their kin).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from engine.model.placement import execution_device
from engine.model.step import step_positions


class StepPositions(torch.nn.Module):
    """The model's own module, but in a flat step each token gets the embedding of its own position.

    Args:
        inner: the model's module.
        num_positions: most positions of a sequence.
    """

    def __init__(self, inner: torch.nn.Module, num_positions: int) -> None:
        super().__init__()
        self.inner = inner
        self._table = _table(inner, num_positions)  # [N, D]; a plain attribute: it is no weight of the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[1, T, D] in a flat step, the model's own result elsewhere."""
        positions = step_positions(self._table.device)
        return self.inner(*args, **kwargs) if positions is None else self._table[positions]


@torch.inference_mode()
def _table(inner: torch.nn.Module, num_positions: int) -> torch.Tensor:
    names = inspect.signature(inner.forward).parameters
    device = execution_device(inner) or torch.device("cpu")
    # M2M100 numbers the tokens that are no padding, so none may be.
    ids = torch.full((1, num_positions), (getattr(inner, "padding_idx", None) or 0) + 1, device=device)
    first = ids.shape if "input_ids_shape" in names else ids
    more = {"position_ids": torch.arange(num_positions, device=device)} if "position_ids" in names else {}
    table: torch.Tensor = inner(first, **more)
    return table.reshape(num_positions, -1).clone()

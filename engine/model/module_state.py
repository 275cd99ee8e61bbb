"""State that a model keeps in its own modules between forwards, saved and restored per sequence.

Knows nothing of what the state means.
Called by model/runner.py's solo lane: RecurrentGemma keeps its recurrent state on its blocks, dynamic RoPE the longest
length it has seen; left alone, one sequence would continue in another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

_PLAIN = (torch.Tensor, int, float, type(None))


class ModuleState:
    """The attributes of a model's modules that forwards change.

    Args:
        model: the model, as freshly loaded.
        trial: runs a few forwards that leave such state behind.
    """

    def __init__(self, model: torch.nn.Module, trial: Callable[[], None]) -> None:
        before = {key: _copy(value) for key, value in _attributes(model)}
        trial()
        changed = [key for key, value in _attributes(model) if key not in before or not _same(before[key], value)]
        modules = dict(model.named_modules())
        # Dynamic RoPE changes only past the original length, which no short trial reaches.
        for name, module in modules.items():
            if hasattr(module, "max_seq_len_cached"):
                changed += [(name, attribute) for attribute in ("inv_freq", "max_seq_len_cached", "attention_scaling")]
        self._places = [(modules[name], attribute) for name, attribute in dict.fromkeys(changed)]
        pristine = [before.get(key) for key in dict.fromkeys(changed)]
        self.restore(pristine)
        self.pristine = pristine

    def __bool__(self) -> bool:
        """Whether there is any such state."""
        return bool(self._places)

    def save(self) -> list[Any]:
        """Copies of the state's values now."""
        return [_copy(getattr(module, attribute, None)) for module, attribute in self._places]

    def restore(self, values: list[Any]) -> None:
        """Put saved values back; the model may change them in place afterwards."""
        for (module, attribute), value in zip(self._places, values, strict=True):
            setattr(module, attribute, _copy(value))


def _attributes(model: torch.nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for name, module in model.named_modules():
        for attribute, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, _PLAIN) and not attribute.startswith("_"):
                yield (name, attribute), value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return old.shape == new.shape and torch.equal(old, new)
    return type(old) is type(new) and bool(old == new)

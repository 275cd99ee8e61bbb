"""A model whose weights do not lie on one device: where they are, and where its modules compute.

Knows nothing of memory that is free, of lanes or of KV; accelerate decides what goes where and moves it about.
Called by the loader; its small questions are asked by whatever makes tensors for a module.

accelerate gives such a model's modules hooks: before a module's forward its inputs are moved to where it computes, and
weights that wait elsewhere (main memory beside a GPU, the disk) are fetched; after it they are dropped again, so that
between two forwards they are meta tensors without values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.units import size

DISK = "disk"


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """How a model may be spread.

    Args:
        strategy: accelerate's name of it: auto, balanced, balanced_low_0 or sequential.
        max_memory: bytes of weights that each device may hold, by CUDA index or "cpu"; the disk holds the rest.
        offload_directory: where weights go that are not stored as the model wants them; others are read where they lie.
    """

    strategy: str
    max_memory: Mapping[int | str, int]
    offload_directory: Path | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What from_pretrained is to be given."""
        folder = None if self.offload_directory is None else str(self.offload_directory)
        return {"device_map": self.strategy, "max_memory": dict(self.max_memory), "offload_folder": folder}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a spread model are.

    Args:
        device: takes inputs and gives logits.
        resident: bytes of weights that stay on a device that computes, by its name.
        fetched: bytes of weights that wait elsewhere and come to `device` in each step: on "cpu", on "disk".
        largest_fetched: bytes of weights that are fetched at once, at most.
    """

    device: torch.device
    resident: Mapping[str, int]
    fetched: Mapping[str, int]
    largest_fetched: int

    @property
    def devices(self) -> tuple[str, ...]:
        """Those that compute."""
        return tuple(self.resident)

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """All weights, by where they are between steps."""
        return {**self.resident, **self.fetched}

    def __str__(self) -> str:
        parts = [f"{size(num_bytes)} on {name}" for name, num_bytes in self.resident.items()]
        parts += [f"{size(num_bytes)} on {name}, fetched in each step" for name, num_bytes in self.fetched.items()]
        return "; ".join(parts)


def infer_map(model: Any, request: PlacementRequest) -> dict[str, int | str]:
    """Where from_pretrained would put the modules of a drawn model: CUDA index, "cpu" or "disk", by name."""
    from transformers.integrations.accelerate import _get_device_map

    model.tie_weights()
    return dict(_get_device_map(model, request.strategy, dict(request.max_memory), None))


def placement_by(model: Any, device_map: Mapping[str, int | str]) -> Placement | None:
    """Where a model's weights are by a map; None where that is one device, which then needs no hooks."""
    from transformers.integrations.accelerate import get_device

    places = set(map(_name, device_map.values()))
    computing = sorted(places - {"cpu", DISK}) or ["cpu"]
    if len(places) == 1 and DISK not in places:
        return None
    resident: Counter[str] = Counter(dict.fromkeys(computing, 0))
    fetched: Counter[str] = Counter()
    largest = 0
    seen: set[int] = set()  # parameters under two names
    for name, module in model.named_modules():
        at_once = 0
        for parameter_name, parameter in module.named_parameters(prefix=name, recurse=False):
            place = _name(get_device(device_map, parameter_name))
            if place not in resident:
                at_once += parameter.nbytes
            if id(parameter) not in seen:
                (resident if place in resident else fetched)[place] += parameter.nbytes
            seen.add(id(parameter))
        largest = max(largest, at_once)
    return Placement(torch.device(computing[0]), dict(resident), dict(fetched), largest)


def placement_of(model: Any) -> Placement | None:
    """Where a loaded model's weights are; None on one device."""
    return placement_by(model, model.hf_device_map) if is_spread(model) else None


def is_spread(model: Any) -> bool:
    """Whether accelerate moves things about in a model's forwards."""
    return "_hf_hook" in vars(model)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes; None for one without weights."""
    hook = vars(module).get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(_name(device))
    weight = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    return None if weight is None else weight.device


def drop_idle_hooks(model: Any) -> None:
    """Take away the hooks that move nothing, where everything computes on the CPU and only the disk is elsewhere.

    They cost each module's call a walk over its arguments, and a module with a hook is never packed.
    """
    from accelerate.hooks import remove_hook_from_module

    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        if module is not model and hook is not None and not hook.offload:
            remove_hook_from_module(module)
            # It leaves the forward that it found, which is the class's own unless somebody else had put one there.
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                del vars(module)["forward"]


def _name(place: Any) -> str:
    """As torch writes a device: accelerate's maps hold CUDA indices, names and devices."""
    return f"cuda:{place}" if isinstance(place, int) else str(place)

"""--device-map: whether a model has to be spread over devices, and how much of each its weights may take.

Knows nothing of how it is done; what goes where, accelerate decides.
Called by runtime/model_loading.py before weights are loaded, and by runtime/planning.py.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from config import Settings, StartupError
from runtime.drawing import draw_model, read_config
from runtime.hardware import free_bytes_on
from runtime.offload_folder import OffloadFolder

if TYPE_CHECKING:
    from engine.model.blueprint import WeightBytes
    from engine.model.loader import LoadRequest
    from engine.model.placement import PlacementRequest

logger = logging.getLogger(__name__)

# Of a device's free memory, what weights leave for KV and activations.
KEPT_SHARE = 0.2
# The same beside a given --kv-cache-memory: for activations alone.
KEPT_SHARE_BESIDE_KV = 0.1


def place_for_loading(
    settings: Settings, request: LoadRequest, device: str, folder: OffloadFolder
) -> PlacementRequest | None:
    """How a model that is about to be loaded is spread; None for one device, as without --device-map.

    Args:
        settings, request, device: of the load.
        folder: for weights on the disk.

    Raises:
        StartupError: an option needs the model on one device, and it has to be spread.
    """
    from engine.model.blueprint import count_weights, resolve_dtype

    check_device_map(settings, device)
    weights: WeightBytes | None = None
    try:
        config = read_config(settings, request.name)
        dtype = resolve_dtype(settings.torch_dtype, config, None)
        group_size = settings.hqq_group_size if settings.hqq else None
        weights = count_weights(draw_model(request, config, dtype), dtype, device, int4_group_size=group_size)
    except StartupError as error:
        logger.info("--device-map %s: the model's size is not known beforehand: %s", settings.device_map, error)
    placement = choose_placement(settings, device, weights)
    if placement is None:
        logger.info("--device-map %s: everything fits on one device", settings.device_map)
        return None
    try:
        return replace(placement, offload_directory=folder.take())
    except OSError as error:
        raise StartupError(f"--cache-dir {settings.cache_dir}: no place for weights on the disk: {error}") from error


def check_device_map(settings: Settings, device: str) -> None:
    """Raise StartupError for a device that models are not spread from."""
    if settings.device_map is not None and device == "mps":
        raise StartupError(
            f"--device-map {settings.device_map}: should be with --accelerator-type cuda or cpu, not mps"
        )


def choose_placement(settings: Settings, device: str, weights: WeightBytes | None) -> PlacementRequest | None:
    """How a model of that size is spread, offload directory aside; None where it fits on one device.

    Args:
        settings: with a device map or without.
        device: cuda or cpu.
        weights: of the model; None where they are not known.

    Raises:
        StartupError: as place_for_loading.
    """
    from engine.model.placement import PlacementRequest

    strategy = settings.device_map
    if strategy is None:
        return None
    rooms = weight_rooms(settings, device)
    num_cards = sum(1 for name in rooms if name != "cpu")
    room = next(iter(rooms.values()))
    needed = None if weights is None else weights.total
    # The balanced ones are asked for to use all cards; the others to have room.
    wants_all = strategy.startswith("balanced") and num_cards > 1
    if needed is not None and needed <= room and not wants_all:
        return None
    for option, is_on in (("--hqq", settings.hqq), ("--torch-compile", settings.torch_compile)):
        if is_on:
            size = "its size is not known" if needed is None else f"it takes {needed} bytes"
            raise StartupError(
                f"{option} True: needs a model on one device, and --device-map {strategy} has to spread this one: "
                f"{size}, and {room} bytes of one device are for weights"
            )
    return PlacementRequest(strategy, rooms)


def weight_rooms(settings: Settings, device: str) -> dict[int | str, int]:
    """Bytes of weights that each device may hold, as accelerate names them: CUDA indices, then "cpu"."""
    import torch

    cards = range(torch.cuda.device_count()) if device == "cuda" else ()
    computing: dict[int | str, str] = {index: f"cuda:{index}" for index in cards} or {"cpu": "cpu"}
    asked = settings.kv_cache_memory
    rooms: dict[int | str, int] = {}
    for key, name in computing.items():
        free = free_bytes_on(name)
        kept = free * KEPT_SHARE if asked is None else asked / len(computing) + free * KEPT_SHARE_BESIDE_KV
        rooms[key] = max(0, int(free - kept))
    if cards:
        rooms["cpu"] = int(free_bytes_on("cpu") * (1 - KEPT_SHARE_BESIDE_KV))
    return rooms

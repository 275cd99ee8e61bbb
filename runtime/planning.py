"""A dry run of the start: everything that serving would decide, found without loading a weight.

Knows nothing of how a plan is shown or what exit code it means.
Called by main.py for `python main.py plan`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from config import Settings, StartupError
from runtime import engine_limits as limits
from runtime import model_loading as loading
from runtime.checkpoint import HeadersOutOfReach, NoWeights, StoredWeights, read_stored_weights
from runtime.drawing import draw_model, read_config
from runtime.hardware import free_bytes_on
from runtime.model_fit import check_fit, check_loaded, model_type_for
from runtime.placing import check_device_map, choose_placement
from runtime.plan import Demand, Plan, make_plan

if TYPE_CHECKING:
    from engine.model.blueprint import WeightBytes, Widths
    from engine.model.kv_cost import KVCost
    from engine.model.loader import LoadedModel, LoadRequest
    from engine.model.placement import Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What was found out.

    Args:
        model, architecture: as asked, and the class that would serve it.
        device, dtype: where and in what.
        stored: the checkpoint; None where the hub does not answer, and then why_not_stored says so.
        quantised_by: the method of a checkpoint that is quantised already; its weights are counted unpacked.
        weights: in memory.
        kv: of a sequence; None where that depends on values, and then why_no_kv says so.
        demand: all of it, as the plan's arithmetic wants it.
        free_bytes: of the device now; of a model that is spread, of all devices that compute.
        plan: what fits.
        placement: where the weights would be, of a model that --device-map spreads; None on one device.
        strategy: of the device map; None without.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    stored: StoredWeights | None
    why_not_stored: str
    quantised_by: str | None
    weights: WeightBytes
    kv: KVCost | None
    why_no_kv: str
    demand: Demand
    free_bytes: int
    plan: Plan
    placement: Placement | None = None
    strategy: str | None = None


def dry_run(settings: Settings) -> DryRun:
    """Read the config and the headers of what the settings name, and reckon.

    Raises:
        StartupError: serving would refuse these options whatever the memory; one line says which and why.
    """
    source = loading.source_of(settings)
    loading.quieten_libraries()
    device = loading.device_for(settings)
    check_device_map(settings, device)
    check_fit(settings, source, device)
    try:
        stored, why_not_stored = read_stored_weights(source, settings.revision), ""
    except HeadersOutOfReach as error:
        stored, why_not_stored = None, str(error)
    except NoWeights as error:
        raise StartupError(f"--hf-model {settings.hf_model}: {error}") from error
    return _reckon(settings, source, device, stored, why_not_stored)


def _reckon(settings: Settings, source: str, device: str, stored: StoredWeights | None, why_not_stored: str) -> DryRun:
    from engine.model.blueprint import count_weights, measure_widths, resolve_dtype
    from engine.model.kv_cost import NotMeasurable, measure_kv
    from engine.model.loader import describe

    config = read_config(settings, source)
    request = _request(settings, source, device, config)
    dtype = resolve_dtype(settings.torch_dtype, config, None if stored is None else stored.main_dtype)
    quantised_by = _method(config)
    model = draw_model(request, config, dtype)
    weights = count_weights(model, dtype, device, int4_group_size=settings.hqq_group_size if settings.hqq else None)
    loading_bytes = weights.total
    if settings.hqq and settings.hqq_report:  # the plain weights come first, to compare with
        loading_bytes = count_weights(model, dtype, device).parameters
    placement = _placement(settings, device, model, weights)
    loaded = describe(model)
    check_loaded(settings, loaded)
    widths = measure_widths(model, dtype)
    kv: KVCost | None = None
    why_no_kv = ""
    try:
        kv = measure_kv(model)
    except NotMeasurable as error:
        why_no_kv = str(error)
    if kv is not None and kv.lane == "solo" and kv.is_certain and settings.static_cache:
        raise StartupError(f"--static-cache True: this model keeps a cache of its own for each sequence: {kv.reason}")
    demand = _demand(settings, loaded, device, kv, loading_bytes, weights, widths)
    free_bytes = free_bytes_on(device)
    if placement is not None:
        # On the devices that compute: what stays there, and room for what is fetched.
        needed = sum(placement.resident.values()) + placement.largest_fetched + weights.buffers
        demand = replace(demand, resident_bytes=needed, loading_bytes=needed)
        free_bytes = sum(free_bytes_on(name) for name in placement.devices)
    return DryRun(
        model=settings.hf_model,
        architecture=type(model).__name__,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        stored=stored,
        why_not_stored=why_not_stored,
        quantised_by=quantised_by,
        weights=weights,
        kv=kv,
        why_no_kv=why_no_kv,
        demand=demand,
        free_bytes=free_bytes,
        plan=make_plan(demand, free_bytes),
        placement=placement,
        strategy=settings.device_map,
    )


def _placement(settings: Settings, device: str, model: Any, weights: WeightBytes) -> Placement | None:
    """Where a drawn model's weights would be, if they have to be spread."""
    from engine.model.placement import infer_map, placement_by

    wanted = choose_placement(settings, device, weights)
    return None if wanted is None else placement_by(model, infer_map(model, wanted))


def _request(settings: Settings, source: str, device: str, config: Any) -> LoadRequest:
    from engine.model.loader import LoadRequest, family_of

    return LoadRequest(
        name=source,
        model_type=model_type_for(settings, family_of(config)),
        dtype=settings.torch_dtype,
        device=device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def _method(config: Any) -> str | None:
    """How the checkpoint is quantised already."""
    quantisation = getattr(config, "quantization_config", None)
    if not quantisation:
        return None
    entries = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    return str(entries.get("quant_method", "an unnamed method"))


def _demand(
    settings: Settings,
    loaded: LoadedModel,
    device: str,
    kv: KVCost | None,
    loading_bytes: int,
    weights: WeightBytes,
    widths: Widths,
) -> Demand:
    from engine.build import SMALLEST_SLOT

    return Demand(
        resident_bytes=weights.total,
        loading_bytes=loading_bytes,
        scratch_bytes=weights.scratch,
        widths=widths,
        num_step_tokens=limits.max_batch_tokens_of(settings, loaded, device),
        kv=kv,
        kv_cache_memory=settings.kv_cache_memory,
        kv_share=limits.KV_SHARE_OF_FREE_MEMORY,
        max_num_seqs=settings.continuous_batching_batch_size,
        max_model_len=limits.max_model_len_of(settings, loaded.max_positions),
        max_source_len=limits.max_source_len_of(settings, loaded),
        is_source_fixed=loaded.family == "speech" or settings.static_cache,
        is_static=settings.static_cache,
        smallest_slot=SMALLEST_SLOT,
    )

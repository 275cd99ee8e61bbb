"""A dry run in words and a table, for a terminal.

Knows nothing of how the numbers were found.
Called by main.py with what planning.py made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from engine.units import size
from runtime.plan import estimate_activations
from runtime.planning import DryRun

_LABEL_WIDTH = 14


def plan_text(found: DryRun) -> str:
    """All of it, the verdict last."""
    sections = (
        ("model", [f"{found.model} ({found.architecture}), in {found.dtype} on {found.device}"]),
        ("on disk", _stored(found)),
        ("in memory", _weights(found)),
        ("device map", _device_map(found)),
        ("lane", _lane(found)),
        ("KV", list(_kv(found))),
        ("memory", _memory(found)),
    )
    lines = [f"{label if first else '':{_LABEL_WIDTH}}{line}"
             for label, texts in sections for first, line in _with_first(texts)]  # fmt: skip
    if found.plan.lengths:
        lines += ["", *_table(found), ""]
    return "\n".join([*lines, *_verdict(found)])


def _with_first(texts: Sequence[str]) -> Iterator[tuple[bool, str]]:
    return ((index == 0, text) for index, text in enumerate(texts))


def _by_dtype(sizes: Mapping[str, int]) -> str:
    ordered = sorted(sizes.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in ordered)


def _stored(found: DryRun) -> list[str]:
    stored = found.stored
    if stored is None:
        return [f"not known: the headers could not be read ({found.why_not_stored})"]
    files = "1 file" if stored.num_files == 1 else f"{stored.num_files} files"
    lines = [f"{size(stored.num_bytes)} in {files}: {_by_dtype(stored.bytes_by_dtype)}"]
    if found.quantised_by is not None:
        lines.append(f"quantised by {found.quantised_by}; counted below as unpacked, which it is where kernels lack")
    return lines


def _weights(found: DryRun) -> list[str]:
    weights = found.weights
    lines = [f"{size(weights.parameters)}, {weights.num_parameters:,} parameters: {_by_dtype(weights.by_dtype)}"]
    if weights.num_quantised:
        lines.append(f"{weights.num_quantised} linear layers in int4; embeddings, head and the rest as they are")
    if weights.buffers:
        lines.append(f"+ {size(weights.buffers)} of tables that are no parameters")
    if weights.packed_head:
        lines.append(f"+ up to {size(weights.packed_head)}: a packed copy of the head, which the embedding shares")
    return lines


def _device_map(found: DryRun) -> list[str]:
    """Where weights would be; nothing without --device-map."""
    if found.strategy is None:
        return []
    placement = found.placement
    if placement is None:
        return [f"{found.strategy}: everything fits on one device, as without it"]
    lines = [f"{found.strategy}: {size(num_bytes)} on {name}" for name, num_bytes in placement.resident.items()]
    lines += [
        f"{found.strategy}: {size(num_bytes)} on {name}, fetched in each step: as slow as that takes"
        for name, num_bytes in placement.fetched.items()
    ]
    if len(placement.devices) > 1:
        lines.append(f"memory and KV below are those of {', '.join(placement.devices)} together")
    return lines


def _lane(found: DryRun) -> list[str]:
    kv = found.kv
    if kv is None or (not kv.is_certain and kv.lane == "solo"):
        return ["decided by the check at load"]
    return [f"{kv.lane}: {kv.reason}" if kv.is_certain else f"{kv.lane} {kv.reason}"]


def _kv(found: DryRun) -> Iterator[str]:
    kv, demand = found.kv, found.demand
    if kv is None:
        yield f"cannot be told without weights ({found.why_no_kv})"
        return
    if demand.max_source_len is None:
        yield f"{kv.bytes_per_token:,} bytes a token"
    else:
        yield f"{kv.bytes_per_token:,} bytes a token of output, {kv.bytes_per_source_position:,} a source's position"
    if demand.max_source_len is not None and demand.is_source_fixed:
        cross = size(demand.max_source_len * kv.bytes_per_source_position)
        yield f"every source takes {demand.max_source_len:,} positions: {cross} a request"
    if kv.bytes_fixed:
        yield f"+ {size(kv.bytes_fixed)} of state for each sequence, whatever its length"
    if kv.windows is not None:
        num_layers, window = kv.windows
        kept = "all positions are kept nevertheless" if kv.lane == "flat" else "longer sequences take less than shown"
        yield f"{num_layers} layers see {window:,} tokens back and no further; {kept}"
    if demand.is_static:
        yield from _static_arithmetic(found)


def _static_arithmetic(found: DryRun) -> Iterator[str]:
    """As the engine logs it at the start."""
    demand, (length,) = found.demand, found.plan.lengths
    assert found.kv is not None  # there are lengths, so there is KV
    stores = [("decoder", found.kv.bytes_per_token, length.num_tokens)]
    if demand.max_source_len is not None:
        stores.append(("encoder", found.kv.bytes_per_source_position, length.num_source_positions))
    for name, num_bytes, num_positions in stores:
        slot = num_bytes * num_positions
        yield (
            f"static, {name}: {num_bytes} bytes a token x {num_positions} positions = {slot} bytes a slot "
            f"x {demand.max_num_seqs} slots = {slot * demand.max_num_seqs} bytes"
        )


def _memory(found: DryRun) -> list[str]:
    demand, plan = found.demand, found.plan
    given = "--kv-cache-memory" if demand.kv_cache_memory is not None else f"{demand.kv_share:.0%} of that"
    left = max(0, plan.left_bytes)
    lines = [
        f"{size(found.free_bytes)} free, {size(left)} with the weights loaded, {size(plan.kv_budget_bytes)} for KV "
        f"({given})"
    ]
    if found.kv is not None and not demand.is_static and plan.fits:
        most = demand.resident_bytes + plan.kv_budget_bytes + estimate_activations(demand, plan.longest)
        lines.append(f"never more than {size(most)} in all: whatever comes, KV stays within its share")
    return lines


def _table(found: DryRun) -> list[str]:
    demand = found.demand
    has_source = any(length.num_source_positions for length in found.plan.lengths)
    heads = ["tokens", *(["source"] if has_source else []), "its KV", "its slot",
             f"{demand.max_num_seqs} sequences", "activations", "peak", "fit at once"]  # fmt: skip
    rows = [heads]
    for length in found.plan.lengths:
        source = [f"{length.num_source_positions:,}"] if has_source else []
        sizes = (length.used_bytes, length.held_bytes, length.batch_bytes, length.activation_bytes, length.peak_bytes)
        rows.append([f"{length.num_tokens:,}", *source, *map(size, sizes), f"{length.num_fitting:,}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _verdict(found: DryRun) -> Iterator[str]:
    plan, demand = found.plan, found.demand
    for warning in plan.warnings:
        yield f"warning: {warning}"
    if plan.problems:
        yield f"does not fit: {'; '.join(plan.problems)}"
    elif found.kv is None:
        yield "the weights fit; what a sequence takes shows at load"
    else:
        source = "" if plan.longest_source is None else f" from a source of {plan.longest_source:,} positions"
        yield (
            f"fits: up to {demand.max_num_seqs} sequences a step, the longest of {plan.longest:,} tokens{source}; "
            "activations are an estimate"
        )

"""From settings and a loaded model to what the engine may take: lengths, tokens a step, KV memory, how to compile.

Knows nothing of how a model is loaded; torch is asked for free memory alone.
Called by runtime/model_loading.py; lengths and tokens by runtime/planning.py too.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from config import Settings, StartupError
from engine.config import CompileConfig, EngineConfig
from runtime.hardware import free_bytes_on

if TYPE_CHECKING:
    from engine.model.loader import LoadedModel

logger = logging.getLogger(__name__)

# Running streams are protected by the engine's pacing; these bound how long a step takes when nobody streams yet.
MAX_BATCH_TOKENS_CPU = 512
MAX_BATCH_TOKENS_ACCELERATOR = 2048
# A window of speech is 1,500 positions to encode, too few to fill an accelerator; a CPU is busy with one.
WINDOWS_PER_STEP_ACCELERATOR = 8
# Of the memory that is free once the weights are in; the rest is for activations and for the machine's other work.
KV_SHARE_OF_FREE_MEMORY = 0.8
# Recurrent models and ALiBi have no bound of their own, but an engine needs one to plan by.
MAX_MODEL_LEN_OF_UNBOUNDED = 32_768


def engine_config(settings: Settings, loaded: LoadedModel, device: str) -> EngineConfig:
    """The engine's limits; raises StartupError for an option that does not fit the model or the machine."""
    kv_budget_bytes, kv_limits = _kv_memory(settings, loaded, device)
    return EngineConfig(
        max_num_seqs=settings.continuous_batching_batch_size,
        max_batch_tokens=max_batch_tokens_of(settings, loaded, device),
        max_model_len=max_model_len_of(settings, loaded.max_positions),
        max_source_len=max_source_len_of(settings, loaded),
        kv_budget_bytes=kv_budget_bytes,
        kv_limits=kv_limits,
        is_prefix_caching=settings.prefix_caching,
        is_static_cache=settings.static_cache,
        eos_token_ids=loaded.eos_token_ids,
        profile_directory=_profile_directory() if settings.torch_profiling else None,
        compile=compile_config(settings, device) if settings.torch_compile else None,
        is_overlapped=loaded.device.type == "cuda",
    )


def _kv_memory(settings: Settings, loaded: LoadedModel, device: str) -> tuple[int | None, dict[str, int] | None]:
    """Most bytes of KV in all, and on each device of a model that is spread: the engine knows what its layers take."""
    asked, placement = settings.kv_cache_memory, loaded.placement
    if placement is not None:
        limits = {name: free_bytes_on(name) for name in placement.devices}
        main = str(placement.device)
        limits[main] = max(0, limits[main] - placement.largest_fetched)
        if asked is not None:
            return asked, limits
        return None, {name: int(limit * KV_SHARE_OF_FREE_MEMORY) for name, limit in limits.items()}
    free_bytes = free_bytes_on(device)
    if asked is None:
        return int(free_bytes * KV_SHARE_OF_FREE_MEMORY), None
    if asked > free_bytes:
        raise StartupError(
            f"--kv-cache-memory {asked}: should be at most the {free_bytes} bytes that are free on {device}"
        )
    return asked, None


def compile_config(settings: Settings, device: str) -> CompileConfig:
    """How steps are compiled, and whether they are captured as CUDA graphs too, where there is CUDA."""
    mode = settings.torch_compile_mode
    if device == "mps":
        raise StartupError("--torch-compile True: should be with --accelerator-type cpu or cuda, not mps")
    return CompileConfig(
        cache_root(settings) / "compiled",
        is_autotuned=mode.startswith("max-autotune"),
        has_graphs=device == "cuda" and mode in ("reduce-overhead", "max-autotune"),
    )


def cache_root(settings: Settings) -> Path:
    """Where what was made once is kept; a directory of this start's own without --cache-dir."""
    return Path(settings.cache_dir or tempfile.mkdtemp(prefix="transformers-openai-api-"))


def _profile_directory() -> Path:
    directory = Path(tempfile.gettempdir()) / f"transformers-openai-api-profile-{os.getpid()}"
    logger.info("profiling: Chrome traces of a few steps go to %s, of a few more at SIGUSR1", directory)
    return directory


def max_batch_tokens_of(settings: Settings, loaded: LoadedModel, device: str) -> int:
    """Most tokens of a step: as asked, or by device."""
    default = MAX_BATCH_TOKENS_CPU if device == "cpu" else MAX_BATCH_TOKENS_ACCELERATOR
    if device != "cpu" and loaded.family == "speech" and loaded.max_source_positions is not None:
        default = WINDOWS_PER_STEP_ACCELERATOR * loaded.max_source_positions
    # Every sequence of a full step needs room for its one token.
    return settings.max_batch_tokens or max(default, settings.continuous_batching_batch_size)


def max_model_len_of(settings: Settings, positions: int | None) -> int:
    """The longest sequence: as asked, or what the model has positions for."""
    option, asked = "--max-model-len", settings.max_model_len
    if settings.static_cache:
        option, asked = "--static-cache-decoder-max-length", settings.static_cache_decoder_max_length
    if asked is not None and positions is not None and asked > positions:
        raise StartupError(f"{option} {asked}: should be at most the model's positions ({positions})")
    return asked or positions or MAX_MODEL_LEN_OF_UNBOUNDED


def max_source_len_of(settings: Settings, loaded: LoadedModel) -> int | None:
    """The longest source: as asked, or what the encoder has positions for; None without an encoder."""
    positions = loaded.max_source_positions
    if loaded.family == "decoder":
        return None
    if loaded.family == "speech":
        return positions
    if settings.static_cache:
        return settings.static_cache_encoder_max_length
    return min(settings.max_model_len or MAX_MODEL_LEN_OF_UNBOUNDED, positions or MAX_MODEL_LEN_OF_UNBOUNDED)

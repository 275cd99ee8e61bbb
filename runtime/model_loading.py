"""From settings to everything that serves a model: device, tokenizer, weights, KV budget, engine.

Knows nothing of requests or the event loop; imports torch and transformers inside, so that importing this is quick.
Called by model_manager.py, on the engine thread.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Settings, StartupError
from engine.config import CompileConfig, EngineConfig
from runtime.hardware import free_bytes_on
from runtime.model_fit import check_fit, check_loaded, first_line, model_type_for
from runtime.offload_folder import OffloadFolder
from runtime.placing import place_for_loading

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.model.loader import Family, LoadedModel
    from runtime.engine_thread import StepEngine
    from runtime.transcriber import TranscriberMaker
    from text.prompt import PromptEncoder

logger = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]  # what is being done, and the share done (0 to 1) where it is known

_DEMO = Path(__file__).parent.parent / "demo"
DEMO_MODELS = {"demo": _DEMO / "chat", "demo-t5": _DEMO / "t5", "demo-whisper": _DEMO / "whisper"}
# Running streams are protected by the engine's pacing; these bound how long a step takes when nobody streams yet.
MAX_BATCH_TOKENS_CPU = 512
MAX_BATCH_TOKENS_ACCELERATOR = 2048
# A window of speech is 1,500 positions to encode, too few to fill an accelerator; a CPU is busy with one.
WINDOWS_PER_STEP_ACCELERATOR = 8
# Of the memory that is free once the weights are in; the rest is for activations and for the machine's other work.
KV_SHARE_OF_FREE_MEMORY = 0.8
# Recurrent models and ALiBi have no bound of their own, but an engine needs one to plan by.
MAX_MODEL_LEN_OF_UNBOUNDED = 32_768
# What --hqq-report True measures on: always the same, so that two starts can be compared.
REPORT_TEXT = (
    "The harbour master opened the ledger at six every morning, wrote down the ships that had come in overnight, and "
    "put a small cross beside those that carried salt. In 1887 there were 214 of them. Nobody asked him why he counted "
    "salt and not coal, which paid three times as much; perhaps because his father had drowned with a cargo of it."
)
_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded and how it is served.

    Args:
        name: the served name.
        architecture: the model's class.
        dtype, device: of the weights, as torch writes them.
        lane, lane_reason: how the engine drives the model, and why so.
        max_model_len: most tokens of a sequence, prompt and output.
        vocab_size: the model's padded one; token ids are below it.
        eos_token_ids: tokens that end a sequence.
        kv_budget_bytes, kv_bytes_per_token: most memory for KV, and what a token takes.
        num_parameters: of the model.
        generation_defaults: sampling parameters that the checkpoint recommends, by their wire names.
        family: what kind of model it is: a decoder, an encoder-decoder of text, or one that transcribes speech.
        languages: codes of the languages a speech model can be told; empty for one that knows English only.
        max_source_len: most positions of an encoder's output; None without an encoder.
        decoder_prompt_ids: what an encoder-decoder's decoder begins with, unless the request says otherwise.
        placement: of a model that is spread, bytes of weights by where they are between steps; empty otherwise.
        kv_layout: what keys and values lie in: slots, pages, or caches of the model's own.
    """

    name: str
    architecture: str
    dtype: str
    device: str
    lane: str
    lane_reason: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    kv_budget_bytes: int
    kv_bytes_per_token: int
    num_parameters: int
    generation_defaults: Mapping[str, float]
    family: Family = "decoder"
    languages: tuple[str, ...] = ()
    max_source_len: int | None = None
    decoder_prompt_ids: tuple[int, ...] = ()
    placement: Mapping[str, int] = field(default_factory=dict)
    kv_layout: str = "slots"


@dataclass(frozen=True, slots=True)
class LoadedStack:
    """All that serves one model; `make_transcriber` is there for speech models, `offload_folder` is held meanwhile."""

    engine: StepEngine
    prompts: PromptEncoder
    tokenizer: Any
    info: ModelInfo
    make_transcriber: TranscriberMaker | None = None
    offload_folder: OffloadFolder | None = None


def load_model_stack(settings: Settings, progress: Progress) -> LoadedStack:
    """Loads what the settings name; the caller's thread owns the engine from here on.

    Raises:
        StartupError: the options do not fit the model or the machine; one line says which and why.
    """
    source = source_of(settings)
    progress("importing torch and transformers", None)
    from text.errors import TokenizerError
    from text.prompt import PromptEncoder
    from text.tokenizer import load_tokenizer

    quieten_libraries()
    device = device_for(settings)
    if device == "cpu":
        _use_cores()
    family = check_fit(settings, source, device)
    progress(f"loading the tokenizer of {source}", None)
    try:
        tokenizer = load_tokenizer(
            source,
            tokenizer_type=settings.tokenizer_type,
            use_fast=settings.tokenizer_use_fast,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
        folder = None if settings.device_map is None else OffloadFolder(_cache_root(settings) / "offload")
        loaded = _load_model(settings, source, device, family, tokenizer, folder, progress)
        check_loaded(settings, loaded)
        config = _engine_config(settings, loaded, device)
        has_source = config.max_source_len is not None
        prompts = PromptEncoder(
            tokenizer, max_model_len=config.max_source_len or config.max_model_len, is_source=has_source
        )
    except TokenizerError as error:
        raise StartupError(first_line(error)) from error
    make_transcriber: TranscriberMaker | None = None
    languages: tuple[str, ...] = ()
    if loaded.family == "speech":
        make_transcriber, languages = _speech(settings, source, loaded, tokenizer)
    engine = _build_engine(loaded, config, progress)
    info = replace(_info(settings, loaded, config, engine), languages=languages)
    return LoadedStack(engine, prompts, tokenizer, info, make_transcriber, folder)


def source_of(settings: Settings) -> str:
    """Hub id or directory of the model."""
    name = settings.hf_model
    demo = DEMO_MODELS.get(name)
    if settings.revision is not None and (demo is not None or Path(name).is_dir()):
        raise StartupError(f"--revision {settings.revision}: {name} is a local directory, which has no revisions")
    if demo is None:
        return name
    if not demo.is_dir():
        raise StartupError(f"--hf-model {name}: {demo} is missing; it comes with the project's files")
    return str(demo)


def quieten_libraries() -> None:
    """One voice in the log: transformers' lines go through ours, its bars only to a terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def device_for(settings: Settings) -> str:
    """The device to run on: as asked, else the CPU where there is no other; raises StartupError for one not there."""
    import torch

    wanted = settings.accelerator_type
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[wanted]
    if is_there:
        return wanted
    if settings.is_given("accelerator_type"):
        raise StartupError(f"--accelerator-type {wanted}: torch {torch.__version__} finds no such device here")
    logger.warning("no CUDA device found by torch %s: running on the CPU", torch.__version__)
    return "cpu"


def _use_cores() -> None:
    import torch

    from runtime.hardware import usable_cores

    # torch has already obeyed OMP_NUM_THREADS, so its own number is a bound too.
    num_threads = min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(num_threads)
    logger.info("computing with %d CPU threads", num_threads)


def _load_model(
    settings: Settings,
    source: str,
    device: str,
    family: Family | None,
    tokenizer: Any,
    folder: OffloadFolder | None,
    progress: Progress,
) -> LoadedModel:
    from engine.model.loader import LoadError, LoadRequest, load_model
    from engine.model.quantize import QuantiseRequest

    quantise = None
    if settings.hqq:
        quantise = QuantiseRequest(
            group_size=settings.hqq_group_size,
            directory=Path(settings.cache_dir) / "int4" if settings.cache_dir else None,
            report_token_ids=tuple(tokenizer.encode(REPORT_TEXT)) if settings.hqq_report else None,
        )
    request = LoadRequest(
        name=source,
        model_type=model_type_for(settings, family),
        dtype=settings.torch_dtype,
        device=device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        quantise=quantise,
        kernel_directory=Path(settings.cache_dir) / "kernels" if settings.cache_dir else None,
    )
    if folder is not None:
        request = replace(request, placement=place_for_loading(settings, request, device, folder))
    try:
        return load_model(request, progress)
    except LoadError as error:
        raise StartupError(" ".join(str(error).split())) from error


def _speech(
    settings: Settings, source: str, loaded: LoadedModel, tokenizer: Any
) -> tuple[TranscriberMaker, tuple[str, ...]]:
    """What makes the transcriber of a speech model, and the languages it knows."""
    from runtime.hardware import usable_cores
    from runtime.recordings import Recordings
    from runtime.speech_model import NotASpeechModel, speech_model_of
    from runtime.transcriber import transcriber_maker

    recordings = Recordings(
        _feature_extractor(settings, source),
        max_seconds=settings.max_audio_seconds,
        median_width=loaded.model.config.median_filter_width,
    )
    checkpoint = (loaded.model.config, loaded.model.generation_config, tokenizer)
    try:
        maker = transcriber_maker(
            *checkpoint,
            recordings,
            num_threads=usable_cores(),
            max_windows=settings.continuous_batching_batch_size,
        )
        return maker, tuple(speech_model_of(*checkpoint).language_ids)
    except NotASpeechModel as error:
        raise StartupError(f"--hf-model {settings.hf_model}: {first_line(error)}") from error


def _feature_extractor(settings: Settings, source: str) -> Any:
    """The checkpoint's feature extractor, by itself or out of a processor."""
    from importlib import import_module

    path = settings.processor_type if settings.is_given("processor_type") else "AutoFeatureExtractor"
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module or "transformers"), name).from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise StartupError(f"--processor-type {path}: {first_line(error)}") from error
    extractor = getattr(found, "feature_extractor", found)
    if not hasattr(extractor, "hop_length"):
        raise StartupError(f"--processor-type {path}: {type(extractor).__name__} makes no spectrograms")
    return extractor


def _engine_config(settings: Settings, loaded: LoadedModel, device: str) -> EngineConfig:
    default_tokens = MAX_BATCH_TOKENS_CPU if device == "cpu" else MAX_BATCH_TOKENS_ACCELERATOR
    if device != "cpu" and loaded.family == "speech" and loaded.max_source_positions is not None:
        default_tokens = WINDOWS_PER_STEP_ACCELERATOR * loaded.max_source_positions
    kv_budget_bytes, kv_limits = _kv_memory(settings, loaded, device)
    return EngineConfig(
        max_num_seqs=settings.continuous_batching_batch_size,
        # Every sequence of a full step needs room for its one token.
        max_batch_tokens=settings.max_batch_tokens or max(default_tokens, settings.continuous_batching_batch_size),
        max_model_len=max_model_len_of(settings, loaded.max_positions),
        max_source_len=max_source_len_of(settings, loaded),
        kv_budget_bytes=kv_budget_bytes,
        kv_limits=kv_limits,
        is_prefix_caching=settings.prefix_caching,
        is_static_cache=settings.static_cache,
        eos_token_ids=loaded.eos_token_ids,
        profile_directory=_profile_directory() if settings.torch_profiling else None,
        compile=_compile_config(settings, device) if settings.torch_compile else None,
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


def _compile_config(settings: Settings, device: str) -> CompileConfig:
    """How steps are compiled, and whether they are captured as CUDA graphs too, where there is CUDA."""
    mode = settings.torch_compile_mode
    if device == "mps":
        raise StartupError("--torch-compile True: should be with --accelerator-type cpu or cuda, not mps")
    return CompileConfig(
        _cache_root(settings) / "compiled",
        is_autotuned=mode.startswith("max-autotune"),
        has_graphs=device == "cuda" and mode in ("reduce-overhead", "max-autotune"),
    )


def _cache_root(settings: Settings) -> Path:
    return Path(settings.cache_dir or tempfile.mkdtemp(prefix="transformers-openai-api-"))


def _profile_directory() -> Path:
    directory = Path(tempfile.gettempdir()) / f"transformers-openai-api-profile-{os.getpid()}"
    logger.info("profiling: Chrome traces of a few steps go to %s, of a few more at SIGUSR1", directory)
    return directory


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


def _build_engine(loaded: LoadedModel, config: EngineConfig, progress: Progress) -> Engine:
    from engine.build import build_engine

    try:
        return build_engine(loaded, config, progress)
    except ValueError as error:
        raise StartupError(first_line(error)) from error


def _info(settings: Settings, loaded: LoadedModel, config: EngineConfig, engine: Engine) -> ModelInfo:
    generation = getattr(loaded.model, "generation_config", None)
    recommended = {name: getattr(generation, name, None) for name in _GENERATION_DEFAULTS}
    return ModelInfo(
        name=settings.model_name,
        architecture=loaded.architecture,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        lane=engine.lane.name,
        lane_reason=engine.lane.reason,
        max_model_len=config.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=config.eos_token_ids,
        kv_budget_bytes=engine.config.kv_budget_bytes or 0,
        kv_bytes_per_token=engine.lane.kv_bytes_per_token,
        num_parameters=loaded.num_parameters,
        generation_defaults={name: value for name, value in recommended.items() if value is not None},
        family=loaded.family,
        max_source_len=config.max_source_len,
        decoder_prompt_ids=loaded.decoder_prompt_ids,
        kv_layout=engine.lane.kv_layout,
        placement={} if loaded.placement is None else loaded.placement.bytes_by_place,
    )

"""From settings to everything that serves a model: device, tokenizer, weights, KV budget, engine.

Knows nothing of requests or the event loop; imports torch and transformers inside, so that importing this is quick.
Called by model_manager.py, on the engine thread.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Settings, StartupError
from engine.config import EngineConfig
from runtime.engine_limits import cache_root, engine_config
from runtime.model_fit import check_fit, check_loaded, first_line, model_type_for
from runtime.offload_folder import OffloadFolder
from runtime.placing import place_for_loading
from runtime.speech_loading import load_speech

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
        folder = None if settings.device_map is None else OffloadFolder(cache_root(settings) / "offload")
        loaded = _load_model(settings, source, device, family, tokenizer, folder, progress)
        check_loaded(settings, loaded)
        config = engine_config(settings, loaded, device)
        has_source = config.max_source_len is not None
        prompts = PromptEncoder(
            tokenizer, max_model_len=config.max_source_len or config.max_model_len, is_source=has_source
        )
    except TokenizerError as error:
        raise StartupError(first_line(error)) from error
    make_transcriber: TranscriberMaker | None = None
    languages: tuple[str, ...] = ()
    if loaded.family == "speech":
        make_transcriber, languages = load_speech(settings, source, loaded, tokenizer)
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

"""Whether the options, the checkpoint and the machine go together, as far as the checkpoint's config tells.

Knows nothing of weights; what it refuses costs no download.
Called by runtime/model_loading.py and runtime/planning.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from config import Settings, StartupError

if TYPE_CHECKING:
    from engine.model.loader import Family, LoadedModel

logger = logging.getLogger(__name__)

_MODEL_TYPES: dict[Family, str] = {
    "decoder": "AutoModelForCausalLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
}


def check_fit(settings: Settings, source: str, device: str) -> Family | None:
    """What can be refused before the weights are fetched; the family, where the config tells."""
    from transformers import AutoConfig

    from engine.model.loader import family_of

    dtype = settings.torch_dtype
    if device == "cpu" and dtype == "float16":
        raise StartupError("--torch-dtype float16: should be bfloat16 or float32 on the CPU, which is slow at float16")
    try:
        config = AutoConfig.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        if "." in settings.model_type:
            return None  # one's own class may bring a config that transformers does not know
        raise StartupError(f"--hf-model {settings.hf_model}: {first_line(error)}") from error
    family = family_of(config)
    _check_family(settings, config.model_type, family)
    stored = str(getattr(config, "dtype", None))
    if settings.hqq:
        _check_hqq(settings, config)
    if device == "cpu" and dtype == "auto" and stored == "torch.float16":
        raise StartupError("--torch-dtype auto: the checkpoint is float16; on the CPU choose bfloat16 or float32")
    is_half = dtype == "float16" or (dtype == "auto" and stored == "torch.float16")
    if is_half and hasattr(config, "relative_attention_num_buckets"):
        raise StartupError(f"--torch-dtype {dtype}: T5's activations overflow in float16; choose bfloat16 or float32")
    return family


def _check_family(settings: Settings, model_type: str, family: Family) -> None:
    """The checkpoint decides, unless the operator said something else."""
    architecture = "decoder" if family == "decoder" else "encoder-decoder"
    if family == "speech" and model_type != "whisper":
        raise StartupError(f"--hf-model {settings.hf_model}: {model_type} reads speech, and only Whisper is served")
    serving = "whisper" if family == "speech" else "chat"
    for name, value in (("architecture_type", architecture), ("serving_type", serving)):
        given = getattr(settings, name)
        if given == value:
            continue
        if settings.is_given(name):
            option = f"--{name.replace('_', '-')} {given}"
            raise StartupError(f"{option}: {settings.hf_model} is a {model_type}, so it should be {value}")
        logger.info("%s: %s (the checkpoint is a %s)", name.replace("_", " "), value, model_type)
    if family != "speech" and settings.is_given("processor_type"):
        raise StartupError(f"--processor-type {settings.processor_type}: has no effect on a model that reads text")
    if family == "decoder" and settings.is_given("static_cache_encoder_max_length"):
        length = settings.static_cache_encoder_max_length
        raise StartupError(f"--static-cache-encoder-max-length {length}: {model_type} has no encoder")


def _check_hqq(settings: Settings, config: Any) -> None:
    """What the checkpoint's config says of --hqq."""
    method = getattr(config, "quantization_config", None)
    if method is not None:
        name = method.get("quant_method", "") if isinstance(method, dict) else getattr(method, "quant_method", "")
        raise StartupError(f"--hqq True: the weights of {settings.hf_model} are quantised already ({name})")
    stored = str(getattr(config, "dtype", None))
    if settings.torch_dtype == "auto" and stored != "torch.bfloat16":
        raise StartupError(f"--hqq True: needs --torch-dtype bfloat16, and auto follows the checkpoint's {stored}")


def check_loaded(settings: Settings, loaded: LoadedModel) -> None:
    """What only the loaded model can tell: one's own classes come without a config that is known before."""
    given = settings.static_cache_encoder_max_length
    positions = loaded.max_source_positions
    if not settings.is_given("static_cache_encoder_max_length") or positions is None:
        return
    if given > positions or (loaded.family == "speech" and given != positions):
        rule = "exactly" if loaded.family == "speech" else "at most"
        raise StartupError(
            f"--static-cache-encoder-max-length {given}: should be {rule} the encoder's positions ({positions})"
        )


def model_type_for(settings: Settings, family: Family | None) -> str:
    """The class that loads the model: as asked, else the one for its family."""
    return settings.model_type if settings.is_given("model_type") or family is None else _MODEL_TYPES[family]


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

"""From a loaded speech model to what makes its transcriber, and the languages that it knows.

Knows nothing of weights or of the engine; imports transformers inside, so that importing this is quick.
Called by runtime/model_loading.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config import Settings, StartupError
from runtime.model_fit import first_line

if TYPE_CHECKING:
    from engine.model.loader import LoadedModel
    from runtime.transcriber import TranscriberMaker


def load_speech(
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

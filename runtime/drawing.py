"""The model that the settings name, without its weights: for whoever wants to know its size before it is loaded.

Knows nothing of memory.
Called by runtime/planning.py and runtime/placing.py.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from config import Settings, StartupError
from runtime.model_fit import first_line

if TYPE_CHECKING:
    from engine.model.loader import LoadRequest


def read_config(settings: Settings, source: str) -> Any:
    """The checkpoint's config; raises StartupError where transformers knows none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        # Serving could go on with a class of one's own, which brings its config; without it there is nothing to draw.
        raise StartupError(f"--hf-model {settings.hf_model}: {first_line(error)}") from error


def draw_model(request: LoadRequest, config: Any, dtype: Any) -> Any:
    """The model on the meta device; raises StartupError where class and config do not go together."""
    from transformers import GenerationConfig

    from engine.model.blueprint import draw
    from engine.model.loader import LoadError

    try:
        model = draw(request, config, dtype)
    except LoadError as error:
        raise StartupError(" ".join(str(error).split())) from error
    with suppress(OSError):  # many checkpoints have none
        # It may ask for another kind of cache than the model's own.
        model.generation_config = GenerationConfig.from_pretrained(request.name, revision=request.revision)
    return model

"""From a model's name to its weights on the device: the real loading, with transformers' own code.

Knows nothing of lanes, batches, flags or text.
Called by model_manager on the engine thread, which reports progress and turns failures into a clear exit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from engine.model.drift import measure_drift, trial_logits
from engine.model.int4.linear import Int4Linear
from engine.model.linear import prepack_linears
from engine.model.native_kernels import NativeKernels, load_native
from engine.model.native_linear import use_native_head
from engine.model.placement import Placement, PlacementRequest, drop_idle_hooks, placement_of
from engine.model.quantize import Quantisation, QuantiseRequest

logger = logging.getLogger(__name__)

Family = Literal["decoder", "encoder-decoder", "speech"]
Progress = Callable[[str, float | None], None]  # what is being done, and the share done (0 to 1) where it is known

# Packing a head that is tied to the embedding keeps both forms: worth it up to a third of the model.
MAX_EXTRA_SHARE = 3
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LoadError(Exception):
    """The model cannot be loaded as asked; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load and how.

    Args:
        name: hub id or local directory.
        model_type: a class of transformers, or a dotted path.
        dtype: bfloat16, float16, float32, or auto for the checkpoint's own.
        device: "cpu", "cuda", "mps".
        revision: hub revision; None for the default.
        trust_remote_code: whether code that comes with the checkpoint may run.
        quantise: how to quantise the linear layers to int4; None for not at all.
        placement: how to spread the model over several devices, main memory and the disk; None for one device.
        kernel_directory: where our own kernels for this CPU are kept; None to do without them.
    """

    name: str
    model_type: str = "AutoModelForCausalLM"
    dtype: str = "bfloat16"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    quantise: QuantiseRequest | None = None
    placement: PlacementRequest | None = None
    kernel_directory: Path | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, in eval mode, and what it says of itself.

    Args:
        max_positions: of the decoder; None where the architecture has no bound.
        max_source_positions: of the encoder's output; None where there is no encoder, or no bound.
        family: a causal LM, or an encoder-decoder that reads text or speech.
        decoder_prompt_ids: what an encoder-decoder's decoder begins with: the start token, and the one that its
            generation config forces after it (mBART's and M2M100's language).
        alignment_heads: of a speech model, by decoder layer, the heads that show where in the audio a token is.
        placement: where the weights are, of a model that is spread; `device` is then where inputs go.
    """

    model: Any
    device: torch.device
    dtype: torch.dtype
    num_parameters: int
    num_bytes: int
    max_positions: int | None
    vocab_size: int
    eos_token_ids: frozenset[int]
    family: Family = "decoder"
    max_source_positions: int | None = None
    alignment_heads: Mapping[int, list[int]] = field(default_factory=dict)
    decoder_prompt_ids: tuple[int, ...] = ()
    placement: Placement | None = None

    @property
    def architecture(self) -> str:
        """The model's class name, such as LlamaForCausalLM."""
        return type(self.model).__name__


def load_model(request: LoadRequest, progress: Progress) -> LoadedModel:
    """Load a checkpoint's safetensors onto the device.

    Raises:
        LoadError: the class, the checkpoint or the dtype do not go together; one line says why.
    """
    model_class = resolve_class(request.model_type)
    if request.quantise is not None:
        return _load_quantised(model_class, request, request.quantise, progress)
    progress(f"loading the weights of {request.name}", None)
    arguments = {} if request.placement is None else request.placement.arguments
    return _settle(_read(model_class, request, arguments), request, progress)


def _read(model_class: Any, request: LoadRequest, arguments: dict[str, Any]) -> Any:
    dtype: torch.dtype | str = "auto" if request.dtype == "auto" else DTYPES[request.dtype]
    try:
        return model_class.from_pretrained(
            request.name,
            dtype=dtype,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
            use_safetensors=True,  # pickled weights can run code
            **arguments,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise LoadError(f"{request.name} cannot be loaded: {_first_line(error)}") from error


def _settle(model: Any, request: LoadRequest, progress: Progress, kernels: NativeKernels | None = None) -> LoadedModel:
    """Bring a model that was read to its device, in the form that is fastest there; a spread one is where it is."""
    if placement_of(model) is None:
        progress(f"moving {request.name} to {request.device}", None)
        model.to(torch.device(request.device))
    loaded = describe(model)
    if loaded.placement is not None:
        logger.info("the weights are spread: %s", loaded.placement)
        if loaded.placement.devices == ("cpu",):
            drop_idle_hooks(model)
    if loaded.device.type == "cpu":
        progress("packing the weights for this CPU", None)
        directory = request.kernel_directory
        if kernels is None and directory is not None and loaded.dtype is torch.bfloat16:
            kernels = load_native(directory)
        pack_weights(loaded, kernels)
    return loaded


def pack_weights(loaded: LoadedModel, kernels: NativeKernels | None = None) -> None:
    """Lay out the linear layers of a model on the CPU as kernels read them (our own too, where they are given).

    The model is changed in place.
    """
    prepack_linears(
        loaded.model,
        max_extra_bytes=loaded.num_bytes // MAX_EXTRA_SHARE,
        has_float32=packs_float32(loaded.model.config),
        kernels=kernels,
    )


def packs_float32(config: Any) -> bool:
    """Whether a model's layers in float32 are packed too, or those in bfloat16 alone (model/linear.py says why)."""
    return family_of(config) != "decoder"


def _load_quantised(
    model_class: Any, request: LoadRequest, quantise: QuantiseRequest, progress: Progress
) -> LoadedModel:
    """Load with int4 weights, and say how far the logits drifted where that was asked for."""
    expected = None
    if quantise.report_token_ids is not None:
        progress(f"loading {request.name} in bfloat16, to compare with", None)
        expected = trial_logits(_read(model_class, request, {}).to(request.device), quantise.report_token_ids)
    progress(f"loading the weights of {request.name}", None)
    try:
        with Quantisation(request.name, quantise, torch.device(request.device), progress) as quantisation:
            model = _read(model_class, request, quantisation.arguments)
            quantisation.check()
    except RuntimeError as error:
        raise LoadError(f"--hqq True: {_first_line(error)}") from error
    kernels = quantisation.native_kernels
    loaded = _settle(model, request, progress, kernels)
    if kernels is not None:
        use_native_head(model, kernels)
    if expected is not None and quantise.report_token_ids is not None:
        logger.info("%s", measure_drift(expected, trial_logits(loaded.model, quantise.report_token_ids)))
    return loaded


def describe(model: Any) -> LoadedModel:
    """Put a model in eval mode and read what the engine needs from its config."""
    model.eval()
    model.requires_grad_(False)
    text = model.config.get_text_config(decoder=True)
    # The embedding has the padded size; the config's vocab_size may be smaller, and logits follow the embedding.
    embeddings = model.get_output_embeddings() or model.get_input_embeddings()
    vocab_size = embeddings.weight.shape[0] if hasattr(embeddings, "weight") else text.vocab_size
    placement = placement_of(model)
    device = next(model.parameters()).device if placement is None else placement.device
    family = family_of(model.config)
    int4_layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    return LoadedModel(
        model=model,
        device=device,
        dtype=model.dtype,
        num_parameters=sum(p.numel() for p in model.parameters()) + sum(m.num_weights for m in int4_layers),
        num_bytes=sum(p.nbytes for p in model.parameters()) + sum(m.num_bytes for m in int4_layers),
        max_positions=decoder_positions(model.config),
        vocab_size=int(vocab_size),
        eos_token_ids=_eos_token_ids(model),
        family=family,
        max_source_positions=None if family == "decoder" else _max_source_positions(model.config),
        alignment_heads=_alignment_heads(model) if family == "speech" else {},
        decoder_prompt_ids=() if family == "decoder" else _decoder_prompt_ids(model),
        placement=placement,
    )


def family_of(config: Any) -> Family:
    """What kind of model a config describes."""
    if not getattr(config, "is_encoder_decoder", False):
        return "decoder"
    return "speech" if config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES else "encoder-decoder"


def resolve_class(name: str) -> Any:
    """The class that --model-type names: one of transformers, or by a dotted path.

    Raises:
        LoadError: there is no such class.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise LoadError(f"--model-type {name}: {_first_line(error)}") from error
    found = getattr(transformers, name, None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise LoadError(f"--model-type {name}: transformers has no model class of that name")
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def max_positions(text_config: Any) -> int | None:
    """The longest context the config admits to; None when the architecture has no bound (recurrent models)."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length",
                 "max_target_positions"):  # fmt: skip
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def decoder_positions(config: Any) -> int | None:
    """Most tokens of a sequence of a causal LM or a decoder; None where the architecture has no bound.

    T5's positions are relative, and its config's n_positions bounds nothing.
    """
    text = config.get_text_config(decoder=True)
    if family_of(config) == "decoder":
        return max_positions(text)
    if hasattr(text, "relative_attention_num_buckets"):
        return None
    return getattr(text, "max_target_positions", None) or max_positions(text)


def _max_source_positions(config: Any) -> int | None:
    """Of an encoder's output."""
    if hasattr(config, "relative_attention_num_buckets"):
        return None
    encoder = getattr(config, "encoder", None)
    source = encoder if hasattr(encoder, "max_position_embeddings") else config
    return getattr(config, "max_source_positions", None) or max_positions(source)


def _decoder_prompt_ids(model: Any) -> tuple[int, ...]:
    """As generate() begins: decoder_start_token_id, else BOS, then forced_bos_token_id where there is one."""
    configs = [config for config in (getattr(model, "generation_config", None), model.config) if config is not None]

    def find(*names: str) -> int | None:
        values = (getattr(config, name, None) for name in names for config in configs)
        return next((int(v) for v in values if isinstance(v, int)), None)

    start = find("decoder_start_token_id", "bos_token_id")
    forced = find("forced_bos_token_id")
    return (0 if start is None else start, *(() if forced is None else (forced,)))


def _alignment_heads(model: Any) -> dict[int, list[int]]:
    """By decoder layer; where the generation config names none, all heads of the upper half of the layers."""
    named = getattr(model.generation_config, "alignment_heads", None)
    if not named:
        num_layers, num_heads = model.config.decoder_layers, model.config.decoder_attention_heads
        named = [(layer, head) for layer in range(num_layers // 2, num_layers) for head in range(num_heads)]
    heads: dict[int, list[int]] = {}
    for layer, head in named:
        heads.setdefault(int(layer), []).append(int(head))
    return heads


def _eos_token_ids(model: Any) -> frozenset[int]:
    """EOS of the generation config, which is what generate() stops at; of the config where there is none."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)

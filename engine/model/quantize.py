"""Int4 weights for any checkpoint: each linear layer is quantised as it is read, or taken from an earlier start's file.

Knows nothing of lanes, flags or text; how weights are solved, laid out, multiplied and kept is int4/'s business.
Called by the loader, which hands `Quantisation.arguments` to transformers' from_pretrained.

transformers reads a checkpoint tensor by tensor, renames and merges them as the architecture wants, and offers each
result to a quantiser before it becomes a parameter. That is where layers are replaced, so that at no time more than one
of them is in memory in full, and whatever transformers can load can be quantised.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.model.int4.choice import Choice, choose_layers
from engine.model.int4.disk import KeptWeights, WeightWriter, checkpoint_key
from engine.model.int4.hqq import Int4Weight, solve
from engine.model.int4.kernels import find_kernel
from engine.model.int4.linear import Int4Linear, measure_min_dense_rows
from engine.model.int4.native import NativeInt4
from engine.model.int4.packed import Scratch
from engine.model.int4.report import QuantiseReport, describe_weights
from engine.model.native_kernels import NativeKernels
from engine.model.resident import release_pages, trim_heap

logger = logging.getLogger(__name__)

METHOD = "transformers-openai-api-int4"  # our name among transformers' methods
_PROGRESS_SHARE = 0.1

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class QuantiseRequest:
    """What to quantise and how.

    Args:
        group_size: columns of a weight that share a scale.
        directory: where quantised weights and compiled kernels are kept between starts; None for nowhere.
        report_token_ids: tokens to measure the drift of logits on; None for no report.
    """

    group_size: int = 64
    directory: Path | None = None
    report_token_ids: tuple[int, ...] | None = None


class Quantisation:
    """One load of a checkpoint with int4 weights.

    Args:
        name: of the model, for progress and the name of the file.
        request: how to quantise.
        device: where the weights will be.
        progress: told of every tenth.

    Raises:
        RuntimeError: the device has no int4 kernel that works.
    """

    def __init__(self, name: str, request: QuantiseRequest, device: torch.device, progress: Progress) -> None:
        self._name = name
        self._request = request
        self._device = device
        self._progress = progress
        self._kernel = find_kernel(device, request.directory)
        self._scratch = Scratch()
        self._min_dense_rows: dict[torch.Size, int | None] = {}
        self._choice = Choice({}, {})
        self._refused: dict[str, str] = {}
        self._kept: KeptWeights | None = None
        self._writer: WeightWriter | None = None
        self._num_done = 0
        self.failure: Exception | None = None  # transformers only says that there was one
        self.report: QuantiseReport | None = None

    def __deepcopy__(self, _memo: object) -> Quantisation:
        """Return this one: transformers' Auto classes copy what they are given, and a load is one thing."""
        return self

    @property
    def native_kernels(self) -> NativeKernels | None:
        """Our own kernels, where they are what multiplies."""
        return self._kernel.kernels if issubclass(self._kernel, NativeInt4) else None

    @property
    def arguments(self) -> dict[str, Any]:
        """What from_pretrained is to be given."""
        return {"quantization_config": _Config(self)}

    def begin(self, model: Any, files: list[str] | None) -> None:
        """Choose the layers of a model whose parameters have no memory yet, and look for their weights on disk."""
        self._choice = choose_layers(model, self._kernel, self._request.group_size)
        directory, shapes = self._request.directory, self._choice.shapes
        if directory is None or not files or not shapes:
            return
        try:
            key = checkpoint_key(files, self._request.group_size)
        except OSError as error:
            logger.warning("int4 weights are not kept: %s", error)
            return
        words = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(self._name).name).strip("-.")
        path = directory / f"{words}-{self._request.group_size}-{key[:16]}.safetensors"
        self._kept = KeptWeights.open(path, key, shapes, self._request.group_size)
        if self._kept is None:
            self._writer = WeightWriter(path, key, shapes, self._request.group_size)
        else:
            self._progress(f"int4 weights of {self._name} are taken from {path}", None)

    def wants(self, parameter_name: str) -> bool:
        """Whether a parameter is the weight of a layer that was chosen."""
        name, _, kind = parameter_name.rpartition(".")
        return kind == "weight" and name in self._choice.shapes

    def take(self, model: Any, parameter_name: str, weight: Tensor) -> bool:
        """Put a layer with int4 weights in a layer's place; False where its weight is to become a parameter after all.

        Args:
            model: changed in place.
            parameter_name: of any parameter.
            weight: as it was read; not to be used afterwards if it was taken.
        """
        try:
            return self.wants(parameter_name) and self._replace(model, parameter_name.removesuffix(".weight"), weight)
        except Exception as error:
            self.failure = self.failure or error
            raise

    @torch.no_grad()
    def _replace(self, model: Any, name: str, weight: Tensor) -> bool:
        module = model.get_submodule(name)
        is_transposed = isinstance(module, Conv1D)
        try:
            quantised = self._weight_of(name, weight.t() if is_transposed else weight)
        except ValueError as error:
            self._refused[name] = f"because {error}"  # of values that are not finite
            return False
        shape = self._choice.shapes[name]
        if shape not in self._min_dense_rows:
            self._min_dense_rows[shape] = measure_min_dense_rows(self._kernel, quantised)
        layer = Int4Linear(
            self._kernel(quantised),
            module.bias,
            scratch=self._scratch,
            min_dense_rows=self._min_dense_rows[shape],
            device=self._device,
            is_transposed=is_transposed,
        )
        for parent in model.modules():  # one module may be in several places
            for child_name, child in parent.named_children():
                if child is module:
                    setattr(parent, child_name, layer)
        release_pages(weight)
        self._count()
        return True

    def _weight_of(self, name: str, weight: Tensor) -> Int4Weight:
        """Return a layer's int4 weight, from the disk or by solving."""
        if self._kept is not None:
            kept = self._kept.read(name)
            return Int4Weight(kept.codes.to(self._device), kept.scales.to(self._device), kept.zeros.to(self._device))
        solved = solve(weight.to(self._device), self._request.group_size)
        if self._writer is not None:
            self._writer.write(name, solved)
        return solved

    def _count(self) -> None:
        self._num_done += 1
        total, verb = len(self._choice.shapes), "quantising" if self._kept is None else "reading"
        step = max(1, round(total * _PROGRESS_SHARE))
        if self._num_done % step == 0 or self._num_done == total:
            trim_heap()
            self._progress(f"{verb} {self._name} in int4", self._num_done / total)

    def finish(self, model: Any) -> None:
        """Keep what was solved for the next start, and report; the model is complete."""
        if self._writer is not None:
            self._writer.commit()
        self.report = describe_weights(model, {**self._choice.left_alone, **self._refused})
        logger.info("%s", self.report)

    def check(self) -> None:
        """See that something was quantised.

        Raises:
            RuntimeError: the model has no layer that could be, or its class never asked.
        """
        if self.report is None:
            raise RuntimeError(f"the class that loads {self._name} does not let its weights be quantised")
        if not self.report.num_layers:
            reasons = ", ".join(sorted(set(self._choice.left_alone.values()))) or "it has none"
            raise RuntimeError(f"no linear layer of {self._name} can have int4 weights: {reasons}")

    def __enter__(self) -> Quantisation:
        """Begin; what is within reads the checkpoint."""
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Leave no file open or unfinished, whatever happened; and say what happened to a layer."""
        if self._kept is not None:
            self._kept.close()
        if self._writer is not None:
            self._writer.abandon()
        if error is not None and self.failure is not None:
            raise RuntimeError(f"a layer of {self._name} cannot be quantised: {self.failure}") from self.failure


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How the quantisation travels through from_pretrained."""

    def __init__(self, quantisation: Quantisation) -> None:
        self.quant_method = METHOD
        self.quantisation = quantisation

    def to_dict(self) -> dict[str, Any]:
        """Return nothing of the load: the config is only shown."""
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' side of a Quantisation."""

    quantization_config: _Config

    def param_needs_quantization(self, model: Any, param_name: str, **_kwargs: Any) -> bool:
        """Whether a parameter is offered to our operation."""
        return self.quantization_config.quantisation.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation."""
        return _Quantize(self.quantization_config.quantisation)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):  # transformers has made meta the default for the while
            self.quantization_config.quantisation.begin(model, kwargs.get("checkpoint_files"))

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        self.remove_quantization_config(model)
        # Models ask for it to guess a dtype that ours simply has.
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        self.quantization_config.quantisation.finish(model)

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Never saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Never trained."""
        return False


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Takes the weights it is offered and leaves layers in their place."""

    def __init__(self, quantisation: Quantisation) -> None:
        self._quantisation = quantisation

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **_kwargs: Any
    ) -> dict[str, Any]:
        """Return what remains to be made parameters."""
        remaining = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self._quantisation.take(model, name, tensor):
                remaining[name] = value
            elif missing_keys is not None:
                missing_keys.discard(name)
        return remaining


assert METHOD in AUTO_QUANTIZER_MAPPING  # importing this is what registers it

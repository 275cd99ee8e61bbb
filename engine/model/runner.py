"""One forward for one batch, by either lane: the logits that the batch asked for.

Knows nothing of scheduling policy, sampling or text.
Called by engine.py once a step; which runner a model gets is decided by model/selfcheck.py.

    FlatRunner   all tokens of the step in one row, our attention over slots (model/attention.py)
    SoloRunner   one sequence after the other, with whatever cache the model makes for itself, as generate() does
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from engine.batch import Batch, ScheduledSequence
from engine.kv.pool import CrossOp, Slot, StorageOp
from engine.kv.slots import SlotStorage
from engine.model.chosen_ids import ChosenIds
from engine.model.inputs import FlatInputs, build_inputs
from engine.model.module_state import ModuleState
from engine.model.native_step import kernels_of, native_attention
from engine.model.placement import is_spread
from engine.model.step import FlatStep, Step, flat_step, keep_logit_rows
from engine.sequence import Sequence, Source


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits [R, V] of a step: for each item, in this order, its `num_logits` rows."""

    items: tuple[ScheduledSequence, ...]
    logits: torch.Tensor


class Runner(Protocol):
    """What engine.py asks of a lane."""

    name: str
    can_run_ahead: bool  # whether forward takes tokens that only the device knows

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Bring storage in line with the accounting."""

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """Compute a batch's tokens; where each sequence's only one is not known yet, `chosen_ids` has it."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence."""

    def reset(self) -> None:
        """Drop everything that is kept."""


def accepts(model: torch.nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of that name."""
    return name in inspect.signature(model.forward).parameters


def cuts_logits(model: Any) -> bool:
    """Whether the model computes only the logits that `logits_to_keep` asks for.

    A spread one has its head's input cut instead, as the rows to keep and what they are of may be on two devices.
    """
    if not is_spread(model):
        return accepts(model, "logits_to_keep")
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(keep_logit_rows)
    return False


class StepProgram(Protocol):
    """What computes a flat step, over slots or pages: a lane's own, or compiled steps in its place."""

    model: Any

    def run(self, step: Step) -> torch.Tensor:
        """Logits [R, V] of the tokens that inputs.logit_rows names; slots or pages gain the tokens' K and V."""


LayoutT_contra = TypeVar("LayoutT_contra", contravariant=True)


class CapturedSteps(Protocol[LayoutT_contra]):
    """What may compute a decode step in the program's place; graphs/steps.py has them."""

    def run(self, layout: LayoutT_contra, input_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Logits [R, V], good until the next step; None where the program is to compute it.

        `input_ids`, int64 [1, T] on the device, stand in the place of the layout's where they are given.
        """


class FlatModel:
    """A causal LM, driven flat.

    Args:
        model: whose attention implementation is set to model/attention.py's.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._keeps_rows = cuts_logits(model)
        self._kernels = kernels_of(model)

    def run(self, step: Step) -> torch.Tensor:
        """As StepProgram.run."""
        inputs = step.inputs
        kwargs: dict[str, Any] = {"logits_to_keep": inputs.logit_rows} if self._keeps_rows else {}
        with flat_step(step), native_attention(self._kernels, step):
            output = self.model(input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False, **kwargs)
        logits: torch.Tensor = output.logits[0]
        return logits if logits.shape[0] == inputs.logit_rows.shape[0] else logits[inputs.logit_rows]


class FlatRunner:
    """Runs every token of a step in one forward, KV in slots.

    Args:
        model: a causal LM whose attention implementation is set to model/attention.py's.
        storage: the slots' tensors.
        slot_of: which slot a running sequence holds.
        device: where inputs go.
    """

    name = "flat"
    can_run_ahead = True

    def __init__(
        self, model: Any, storage: SlotStorage, slot_of: Callable[[Sequence], Slot], device: torch.device
    ) -> None:
        self.model = model
        self.storage = storage
        self.slot_of = slot_of
        self.device = device
        self.program: StepProgram = FlatModel(model)

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Resize and copy storage as the accounting decided."""
        self.storage.apply(op for op in ops if not isinstance(op, CrossOp))

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """Compute a batch; the slots of its sequences gain its tokens' K and V.

        Returns:
            Logits [R, V] in the model's dtype.
        """
        inputs = build_inputs(batch, self.slot_of, self.storage, self.device)
        if chosen_ids is not None:
            inputs = replace(inputs, input_ids=chosen_ids.inputs_for(inputs.items))
        return StepLogits(inputs.items, self.run(inputs))

    def run(self, inputs: FlatInputs) -> torch.Tensor:
        """The model over flat inputs; logits [R, V]."""
        return self.program.run(FlatStep(inputs, self.storage))

    def forget(self, sequence: Sequence) -> None:
        """Nothing: what a sequence owns is its slot, and the accounting takes that back."""

    def reset(self) -> None:
        """Drop all storage."""
        self.storage.clear()


@dataclass(slots=True)
class _SoloState:
    """What generate() keeps between two tokens of one sequence, in its arguments and in the model's modules."""

    token_ids: torch.Tensor  # int64 [1, T], all that was fed
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    module_values: list[Any] = field(default_factory=list)


class SoloRunner:
    """Runs sequences one after the other, exactly as generate() steps them; right for every architecture.

    Args:
        model: anything with transformers' GenerationMixin.
        device: where inputs go.
    """

    name = "solo"
    can_run_ahead = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._states: dict[int, _SoloState] = {}
        self._keeps_rows = accepts(model, "logits_to_keep")
        self._takes_mask = accepts(model, "attention_mask")
        self._has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._module_state = ModuleState(model, self._trial)

    def apply(self, ops: Iterable[StorageOp]) -> None:
        """Nothing: the model's cache grows by itself."""

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        """Compute a batch, item by item; every token must be known.

        Returns:
            Logits [R, V] in the model's dtype.
        """
        assert chosen_ids is None  # can_run_ahead says so
        return StepLogits(batch.items, torch.cat([self._advance(item) for item in batch.items]))

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence's cache."""
        self._states.pop(sequence.sequence_id, None)

    def reset(self) -> None:
        """Drop every cache."""
        self._states.clear()

    def state_bytes(self, sequence_id: int) -> int:
        """Bytes of the tensors that a sequence's cache holds."""
        state = self._states[sequence_id]
        return _tensor_bytes((state.model_kwargs, state.module_values), set())

    def _trial(self) -> None:
        """A few tokens, alone, to see what the model leaves in its modules."""
        token_ids = torch.tensor([[3, 1, 2, 3]], device=self.device)
        state = self._begin(token_ids, None if not self._has_encoder else Source(b"", 4, (3, 1, 2, 3)))
        self._step(state, token_ids, num_logits=1, is_first=True)
        self._step(state, token_ids[:, :1], num_logits=1, is_first=False)

    def _advance(self, item: ScheduledSequence) -> torch.Tensor:
        """The item's tokens through the model; logits [num_logits, V]."""
        sequence = item.sequence
        new_ids = torch.tensor(
            [sequence.token_slice(item.start, item.start + item.num_tokens)], dtype=torch.int64, device=self.device
        )
        is_first = item.start == 0
        if is_first:
            state = self._begin(new_ids, sequence.source)
            state.module_values = self._module_state.pristine
            self._states[sequence.sequence_id] = state
        else:
            state = self._states[sequence.sequence_id]
        if self._module_state:
            self._module_state.restore(state.module_values)
        logits = self._step(state, new_ids, num_logits=item.num_logits, is_first=is_first)
        if self._module_state:
            state.module_values = self._module_state.save()
        return logits

    def _step(self, state: _SoloState, new_ids: torch.Tensor, *, num_logits: int, is_first: bool) -> torch.Tensor:
        """One turn of generate()'s loop; logits of the last `num_logits` of the new tokens."""
        if self._keeps_rows:
            state.model_kwargs["logits_to_keep"] = num_logits
        if is_first:
            inputs = self.model.prepare_inputs_for_generation(new_ids, is_first_iteration=True, **state.model_kwargs)
        else:
            state.token_ids = torch.cat([state.token_ids, new_ids], dim=1)
            length = 1 if state.model_kwargs.get("use_cache") else None
            inputs = self.model.prepare_inputs_for_generation(
                state.token_ids, next_sequence_length=length, **state.model_kwargs
            )
        output = self.model(**inputs, return_dict=True)
        state.model_kwargs = self.model._update_model_kwargs_for_generation(
            output, state.model_kwargs, is_encoder_decoder=self._has_encoder
        )
        logits: torch.Tensor = output.logits[0]
        return logits[logits.shape[0] - num_logits :]

    def _begin(self, token_ids: torch.Tensor, source: Source | None) -> _SoloState:
        """Let generate() prepare a sequence as it would (cache, masks, positions), and take over before its loop."""
        prepared = _SoloState(token_ids)

        def take_over(_model: Any, _input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"):
                kwargs.pop(name, None)
            prepared.model_kwargs = kwargs
            return _input_ids

        # The encoder runs here, where there is one, as generate() runs it.
        inputs = [token_ids] if source is None else [torch.tensor([source.token_ids], device=self.device)]
        more = {} if source is None else {"decoder_input_ids": token_ids}
        if self._takes_mask:
            # Left to itself, generate() takes a padding token within the prompt for padding.
            more["attention_mask"] = torch.ones_like(inputs[0])
        self.model.generate(*inputs, custom_generate=take_over, do_sample=False, num_beams=1, max_new_tokens=1, **more)
        return prepared


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors reachable through containers and cache objects."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(entry, seen) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(entry, seen) for entry in value)
    if hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
        return sum(_tensor_bytes(entry, seen) for entry in vars(value).values())
    return 0

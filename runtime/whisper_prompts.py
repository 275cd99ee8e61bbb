"""What a Whisper decoder is given to go on from, and which tokens it may answer with.

Knows nothing of audio, of text or of how sequences run.
Called by the parts of the transcriber.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.sequence import TimestampRules, TokenRules
from runtime.speech_model import SpeechModel
from runtime.transcription import Task


@dataclass(frozen=True, slots=True)
class Manner:
    """How the windows of one recording are to be written down.

    Args:
        language: code; None for a model of English alone.
        task: what to write.
        has_timestamps: whether the model writes moments between its words.
        previous_ids: text that comes before, at most the model's max_prompt_tokens of it.
    """

    language: str | None
    task: Task
    has_timestamps: bool
    previous_ids: tuple[int, ...] = ()


def start_ids(model: SpeechModel, manner: Manner) -> list[int]:
    """<|startoftranscript|>, and language and task where the model has such tokens."""
    if manner.language is None:
        return [model.start_id]
    return [model.start_id, model.language_ids[manner.language], model.task_ids[manner.task]]


def window_prompt(model: SpeechModel, manner: Manner) -> tuple[list[int], int]:
    """The prompt of a window, and where in it <|startoftranscript|> stands."""
    before: list[int] = []
    if manner.previous_ids and model.previous_id is not None:
        before = [model.previous_id, *manner.previous_ids]
    after = [] if manner.has_timestamps else [model.no_timestamps_id]
    return [*before, *start_ids(model, manner), *after], len(before)


def alignment_prompt(model: SpeechModel, manner: Manner, text_ids: Sequence[int]) -> tuple[list[int], int]:
    """A finished text as a prompt to look back on, and the position from which each token is the next one's past.

    From there on, position i sees what token i of the text was written from; one more sees what ended the text.
    """
    start = start_ids(model, manner)
    return [*start, model.no_timestamps_id, *text_ids, model.end_id], len(start)


def window_rules(model: SpeechModel, manner: Manner) -> TokenRules:
    """What may be written in a window."""
    timestamps = TimestampRules(
        first_id=model.first_timestamp_id,
        end_of_text_id=model.end_id,
        no_timestamps_id=model.no_timestamps_id,
        max_initial_index=model.max_initial_timestamp_index,
    )
    return TokenRules(
        suppressed=model.suppressed_ids,
        suppressed_first=model.suppressed_first_ids,
        timestamps=timestamps if manner.has_timestamps else None,
    )


def language_rules(model: SpeechModel) -> TokenRules:
    """Nothing but a language."""
    return TokenRules(allowed=tuple(model.language_ids.values()))

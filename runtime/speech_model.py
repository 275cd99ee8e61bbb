"""What must be known of a Whisper checkpoint to prompt it and to read what it writes, whatever its age and maker.

Knows nothing of weights or of how the model runs; transformers is imported only when a checkpoint is read.
Made once when a speech model is loaded, read by the transcriber and its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = 160
# One step of the timestamp tokens is 0.02 s, and so is one position of the encoder's output.
SAMPLES_PER_POSITION = 320

# Vocabulary sizes of the original checkpoints: one token more, and the model knows many languages. The English ones
# have language tokens too, which they were never trained on.
_NUM_ENGLISH_TOKENS = 51_864
_LANGUAGE_TOKEN = re.compile(r"<\|([a-z]{2,3})\|>")


class NotASpeechModel(ValueError):
    """The checkpoint has no tokens of the kind that a Whisper model has; the message names what is missing."""


@dataclass(frozen=True, slots=True)
class SpeechModel:
    """Tokens and sizes of one Whisper model.

    Args:
        start_id: <|startoftranscript|>.
        end_id: <|endoftext|>; every id below it is text.
        no_timestamps_id: <|notimestamps|>.
        first_timestamp_id: <|0.00|>; every id from here on is a timestamp.
        previous_id: <|startofprev|>; None for a model that takes no prompt.
        no_speech_id: <|nospeech|>, called <|nocaptions|> of old.
        language_ids: by code; empty for a model of English alone.
        language_codes: by name in English (`german`: `de`), for those languages the model has.
        task_ids: of `transcribe` and `translate`; empty for a model of English alone.
        default_language: code that the checkpoint was made for; None to find it from the audio.
        suppressed_ids: never chosen.
        suppressed_first_ids: never chosen first.
        max_initial_timestamp_index: the first timestamp is at most this many steps after <|0.00|>; None for no bound.
        max_target_positions: most tokens, prompt and transcript together.
        num_positions: of the encoder's output.
        num_mels: bins of the spectrogram.
        has_alignment_heads: whether the checkpoint says which heads show where words are.
    """

    start_id: int
    end_id: int
    no_timestamps_id: int
    first_timestamp_id: int
    previous_id: int | None
    no_speech_id: int
    language_ids: Mapping[str, int]
    language_codes: Mapping[str, str]
    task_ids: Mapping[str, int]
    default_language: str | None
    suppressed_ids: tuple[int, ...]
    suppressed_first_ids: tuple[int, ...]
    max_initial_timestamp_index: int | None
    max_target_positions: int
    num_positions: int
    num_mels: int
    has_alignment_heads: bool

    @property
    def is_multilingual(self) -> bool:
        """Whether the model is told a language and a task."""
        return bool(self.language_ids)

    @property
    def samples_per_window(self) -> int:
        """Samples that the encoder sees at once: 30 s of them."""
        return self.num_positions * SAMPLES_PER_POSITION

    @property
    def max_prompt_tokens(self) -> int:
        """How much of a prompt the model looks back on."""
        return self.max_target_positions // 2 - 1 if self.previous_id is not None else 0

    def language_code(self, language: str) -> str | None:
        """The model's code of a language given by code or English name; None where it has no such language."""
        language = language.strip().lower()
        code = self.language_codes.get(language, language)
        return code if code in self.language_ids else None


def speech_model_of(
    config: PreTrainedConfig, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> SpeechModel:
    """Reads a checkpoint; what its generation config leaves out is looked up in the tokenizer.

    Raises:
        NotASpeechModel: it is none, or its tokenizer is not its own.
    """
    tokens = _Tokens(tokenizer.get_vocab())
    no_timestamps_id = _first(generation_config, "no_timestamps_token_id")
    if no_timestamps_id is None:
        no_timestamps_id = tokens.need("<|notimestamps|>")
    start_id = _first(generation_config, "decoder_start_token_id")
    if start_id is None:
        start_id = tokens.need("<|startoftranscript|>")
    end_id = _first(generation_config, "eos_token_id")
    previous_id = _first(generation_config, "prev_sot_token_id")
    no_speech_id = tokens.find("<|nospeech|>", "<|nocaptions|>")
    language_ids, task_ids = _languages_and_tasks(config, generation_config, tokens)
    return SpeechModel(
        start_id=start_id,
        end_id=tokens.need("<|endoftext|>") if end_id is None else end_id,
        no_timestamps_id=no_timestamps_id,
        first_timestamp_id=no_timestamps_id + 1,
        previous_id=tokens.find("<|startofprev|>") if previous_id is None else previous_id,
        # Where generate() looks for it, too.
        no_speech_id=no_timestamps_id - 1 if no_speech_id is None else no_speech_id,
        language_ids=language_ids,
        language_codes=_codes_by_name(language_ids),
        task_ids=task_ids,
        default_language=_default_language(generation_config, language_ids),
        suppressed_ids=tuple(getattr(generation_config, "suppress_tokens", None) or ()),
        suppressed_first_ids=tuple(getattr(generation_config, "begin_suppress_tokens", None) or ()),
        max_initial_timestamp_index=getattr(generation_config, "max_initial_timestamp_index", None),
        max_target_positions=config.max_target_positions,
        num_positions=config.max_source_positions,
        num_mels=config.num_mel_bins,
        has_alignment_heads=bool(getattr(generation_config, "alignment_heads", None)),
    )


class _Tokens:
    """Ids by token; unlike the tokenizer's own way, a token that is not there is not <|endoftext|>."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self.ids = vocabulary

    def find(self, *names: str) -> int | None:
        return next((self.ids[name] for name in names if name in self.ids), None)

    def need(self, name: str) -> int:
        if name not in self.ids:
            raise NotASpeechModel(f"the tokenizer has no token {name}: it is not that of a Whisper model")
        return self.ids[name]


def _first(generation_config: GenerationConfig, name: str) -> int | None:
    """An id, or the first of several."""
    value = getattr(generation_config, name, None)
    return value[0] if isinstance(value, list | tuple) else value


def _languages_and_tasks(
    config: PreTrainedConfig, generation_config: GenerationConfig, tokens: _Tokens
) -> tuple[dict[str, int], dict[str, int]]:
    """Language tokens by code and task tokens by name; both empty where the model knows English alone."""
    given: dict[str, int] = getattr(generation_config, "lang_to_id", None) or {}
    is_multilingual = getattr(generation_config, "is_multilingual", None)
    if is_multilingual is None:
        is_multilingual = bool(given) or config.vocab_size != _NUM_ENGLISH_TOKENS
    if not is_multilingual:
        return {}, {}
    languages = given or _languages_in(tokens)
    codes = {name.removeprefix("<|").removesuffix("|>"): token_id for name, token_id in languages.items()}
    tasks: dict[str, int] = getattr(generation_config, "task_to_id", None) or {}
    found = {task: tasks.get(task, tokens.find(f"<|{task}|>")) for task in ("transcribe", "translate")}
    task_ids = {task: token_id for task, token_id in found.items() if token_id is not None}
    if not codes or "transcribe" not in task_ids:
        return {}, {}
    return codes, task_ids


def _languages_in(tokens: _Tokens) -> dict[str, int]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    matches = {name: _LANGUAGE_TOKEN.fullmatch(name) for name in tokens.ids}
    return {name: tokens.ids[name] for name, match in matches.items() if match is not None and match[1] in LANGUAGES}


def _codes_by_name(language_ids: Mapping[str, int]) -> dict[str, str]:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return {name: code for name, code in TO_LANGUAGE_CODE.items() if code in language_ids}


def _default_language(generation_config: Any, language_ids: Mapping[str, int]) -> str | None:
    """Fine-tunes of one language say so in one of two ways, old and new."""
    language = getattr(generation_config, "language", None)
    if isinstance(language, str):
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = language.lower().removeprefix("<|").removesuffix("|>")
        code = TO_LANGUAGE_CODE.get(code, code)
        return code if code in language_ids else None
    by_id = {token_id: code for code, token_id in language_ids.items()}
    forced: list[list[int | None]] = getattr(generation_config, "forced_decoder_ids", None) or []
    return next((by_id[token_id] for position, token_id in forced if position == 1 and token_id in by_id), None)

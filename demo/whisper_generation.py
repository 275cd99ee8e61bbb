"""The generation defaults of the demo speech model: the fields that every multilingual Whisper checkpoint has.

Knows nothing of training.
Called by train_whisper.py.
"""

from __future__ import annotations

from transformers import GenerationConfig, WhisperTokenizer

from demo.speech.vocabulary import DIGITS
from demo.whisper_model import ALIGNMENT_HEADS
from demo.whisper_tokenizer import MAX_POSITIONS, NO_SPEECH, NO_TIMESTAMPS, PREVIOUS, START, TASKS

# What nobody says: Whisper forbids such marks in the text, for they would describe sounds or name speakers.
_NOT_SAID = tuple('"#()*+/:;<=>@[\\]^_`{|}~')


def generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    """All ids as this tokenizer has them."""

    def marks(*tokens: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(token) for token in tokens]

    blank = tokenizer.encode(" ", add_special_tokens=False)
    end = tokenizer.eos_token_id
    never = [tokenizer.encode(mark, add_special_tokens=False)[0] for mark in _NOT_SAID]
    never += marks(START, *(f"<|{task}|>" for task in TASKS), "<|startoflm|>", PREVIOUS, NO_SPEECH)
    return GenerationConfig(
        alignment_heads=[list(head) for head in ALIGNMENT_HEADS],
        begin_suppress_tokens=[*blank, end],
        bos_token_id=end,
        decoder_start_token_id=marks(START)[0],
        eos_token_id=end,
        is_multilingual=True,
        lang_to_id={f"<|{language}|>": marks(f"<|{language}|>")[0] for language in DIGITS},
        max_initial_timestamp_index=50,
        max_length=MAX_POSITIONS,
        no_timestamps_token_id=marks(NO_TIMESTAMPS)[0],
        pad_token_id=end,
        prev_sot_token_id=marks(PREVIOUS)[0],
        return_timestamps=False,
        suppress_tokens=sorted(never),
        task_to_id={task: marks(f"<|{task}|>")[0] for task in TASKS},
    )

"""Scores the demo speech model with voices that training never heard, and writes the recordings that tests rely on.

Knows nothing of the server; `python -m demo.evaluate_whisper --model demo/whisper` fills in the card and golden.json.
Called by hand after training.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from demo.scores import write_into_card
from demo.speech.pool import Habits, Speak
from demo.speech.speaking import SpeakerProcess
from demo.speech.vocabulary import DIGITS, draw_digits, draw_english_words
from demo.speech.voices import HELD_OUT, TRAINING
from demo.whisper_goldens import write_goldens
from demo.whisper_scores import (
    Listener,
    is_taken_for_silence,
    quiet_windows,
    score_words,
    start_errors,
    trial_windows,
)  # fmt: skip

_SEED = 7_777_777
_NAMES = {"en": "English", "es": "Spanish", "ms": "Malay"}
# Spoken as the training's utterances are, but never one of them: nothing is kept, nothing is stretched.
_HELD_OUT = Habits(HELD_OUT, kept=0, stretch=0.0, draw_words=draw_digits)


def scores(listener: Listener, speak: Speak, num_windows: int) -> list[tuple[str, str, str]]:
    """Lines of the card's table: what, measured, of how many."""
    lines = []
    heard = []
    num_right = num_languages = 0
    for number, language in enumerate(DIGITS):
        for name, habits in (("seen", replace(_HELD_OUT, voices=TRAINING)), ("unseen", _HELD_OUT)):
            windows = trial_windows(speak, habits, language, num_windows, _SEED + number)
            score = score_words(windows, listener.texts(windows, language))
            lines.append(
                (
                    f"word errors, {_NAMES[language]} digits, {name} voices",
                    f"{score.error_rate:.1%}",
                    f"{score.num_words} words",
                )
            )
        starts = listener.start_tokens(windows)
        num_right += sum(start.language == language for start in starts)
        num_languages += len(starts)
        heard += starts
        if language != "en":
            score = score_words(windows, listener.texts(windows, language, "translate"), translated=True)
            lines.append(
                (
                    f"word errors, {_NAMES[language]} digits to English, unseen voices",
                    f"{score.error_rate:.1%}",
                    f"{score.num_words} words",
                )
            )
    said = replace(_HELD_OUT, draw_words=draw_english_words)
    windows = trial_windows(speak, said, "en", num_windows, _SEED + 10)
    for name, with_stamps in (("", False), (", with timestamps", True)):
        score = score_words(windows, listener.texts(windows, "en", stamps=with_stamps))
        lines.append(
            (
                f"word errors, English words and sentences, unseen voices{name}",
                f"{score.error_rate:.1%}",
                f"{score.num_words} words",
            )
        )
    full = trial_windows(speak, _HELD_OUT, "en", num_windows // 2, _SEED + 30, is_full=True)
    for name, with_stamps in ((", with timestamps", True), ("", False)):
        score = score_words(full, listener.texts(full, "en", stamps=with_stamps))
        lines.append(
            (
                f"word errors, half a minute full of English digits, unseen voices{name}",
                f"{score.error_rate:.1%}",
                f"{score.num_words} words",
            )
        )
    lines.append(("language right, unseen voices", f"{num_right / num_languages:.1%}", f"{num_languages} windows"))
    errors = start_errors(listener, windows, "en")
    lines.append(("word starts off, median", f"{statistics.median(errors):.2f} s", f"{len(errors)} words"))
    near = sum(error <= 0.2 for error in errors) / len(errors)
    lines.append(("word starts off by 0.2 s at most", f"{near:.1%}", f"{len(errors)} words"))
    return lines + _silence(
        listener, speak, num_windows, sum(map(is_taken_for_silence, heard)) / len(heard), len(heard)
    )


def _silence(
    listener: Listener, speak: Speak, num_windows: int, false_share: float, num_heard: int
) -> list[tuple[str, str, str]]:
    windows = quiet_windows(speak, _HELD_OUT, num_windows, _SEED + 20)
    found = sum(map(is_taken_for_silence, listener.start_tokens(windows))) / len(windows)
    empty = sum(
        not plain and not stamped
        for plain, stamped in zip(
            listener.texts(windows, "en"), listener.texts(windows, "en", stamps=True), strict=True
        )
    )  # fmt: skip
    return [
        ("silence and noise known by the start token", f"{found:.1%}", f"{len(windows)} windows"),
        ("silence and noise give an empty text", f"{empty / len(windows):.1%}", f"{len(windows)} windows"),
        ("speech taken for silence", f"{false_share:.1%}", f"{num_heard} windows"),
    ]


def main() -> None:
    """Scores, goldens, the card."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate_whisper", description="Scores the demo speech model."
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint; its card is updated")
    parser.add_argument("--num-windows", type=int, default=40, help="windows of each kind (default: 40)")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print only, write nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.num_threads)
    processor = WhisperProcessor.from_pretrained(given.model)
    model = WhisperForConditionalGeneration.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation="eager"
    )
    speak = SpeakerProcess().speak
    table = _table(scores(Listener(model, processor), speak, given.num_windows))
    print(table)
    if given.dry_run:
        return
    for line in write_goldens(given.model, speak):
        print(line)
    write_into_card(given.model / "README.md", table)


def _table(lines: list[tuple[str, str, str]]) -> str:
    rows = [f"| {what} | {measured} | {number} |" for what, measured, number in lines]
    return "\n".join(("| measured | result | of |", "|---|---|---|", *rows))


if __name__ == "__main__":
    main()

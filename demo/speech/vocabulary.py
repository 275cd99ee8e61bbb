"""The words that the demo speech model knows, in three languages, and what is said with them.

Knows nothing of sound or of tokens.
Called by windows.py and evaluate_whisper.py; the order of WORDS is the order of the frame classes.
"""

from __future__ import annotations

import random

DIGITS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "es": ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
    "ms": ("kosong", "satu", "dua", "tiga", "empat", "lima", "enam", "tujuh", "lapan", "sembilan"),
}
_GROUPS = {
    "color": ("red", "green", "blue", "yellow", "black", "white", "orange", "purple"),
    "animal": ("dog", "cat", "bird", "horse", "fish", "tiger", "monkey", "rabbit"),
    "thing": ("house", "garden", "window", "door", "table", "chair", "kitchen", "water", "bread", "coffee", "apple",
              "music", "paper", "letter"),
    "person": ("mother", "father", "brother", "sister", "doctor", "teacher"),
    "time": ("morning", "evening", "today", "tomorrow", "monday", "friday", "winter", "summer"),
    "way": ("left", "right", "up", "down"),
    "quality": ("big", "small", "happy"),
    "other": ("stop", "go", "yes", "no", "hello", "please", "thanks", "the", "and", "is", "my"),
}  # fmt: skip
ENGLISH_WORDS = tuple(word for group in _GROUPS.values() for word in group)
WORDS = (*DIGITS["en"], *ENGLISH_WORDS, *DIGITS["es"], *DIGITS["ms"])
_SENTENCES = (
    "the {color} {animal} is {quality}",
    "the {thing} is {color}",
    "my {person} is happy {time}",
    "my {person} and my {person}",
    "hello {person}",
    "{digit} {color} {animal} and {digit} {color} {animal}",
    "please stop the music",
    "go {way} and {way}",
    "yes please",
    "no thanks",
    "{time} {time} and {time}",
    "the {quality} {thing} and the {quality} {animal}",
    "{color} {thing} {color} {thing}",
    "hello my {quality} {animal}",
    "{digit} {thing} please",
)


def draw_words(rng: random.Random, language: str, max_words: int) -> tuple[str, ...]:
    """Up to so many words to say in one breath: digits, or in English also words and sentences."""
    roll = rng.random()
    length = rng.randint(1, max_words)
    if language != "en" or roll < 0.45:
        return tuple(rng.choice(DIGITS[language]) for _ in range(length))
    if roll < 0.75:
        return tuple(rng.choice(ENGLISH_WORDS) for _ in range(length))
    if roll < 0.82:
        return tuple(rng.choice((*DIGITS["en"], *ENGLISH_WORDS)) for _ in range(length))
    return draw_sentence(rng)[:max_words]


def draw_digits(rng: random.Random, language: str, max_words: int) -> tuple[str, ...]:
    """Up to so many digits."""
    return tuple(rng.choice(DIGITS[language]) for _ in range(rng.randint(1, max_words)))


def draw_english_words(rng: random.Random, language: str, max_words: int) -> tuple[str, ...]:
    """Up to so many English words, in a sentence half of the time."""
    if rng.random() < 0.5:
        return draw_sentence(rng)
    return tuple(rng.choice(ENGLISH_WORDS) for _ in range(rng.randint(1, max_words)))


def draw_sentence(rng: random.Random) -> tuple[str, ...]:
    """One of the sentences, its places filled."""
    said = []
    for word in rng.choice(_SENTENCES).split():
        group = word.strip("{}")
        said.append(word if word == group else rng.choice(DIGITS["en"] if group == "digit" else _GROUPS[group]))
    return tuple(said)


def in_english(language: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The translation, word for word: digits of any language, English words as they are."""
    return tuple(DIGITS["en"][DIGITS[language].index(word)] if language != "en" else word for word in words)

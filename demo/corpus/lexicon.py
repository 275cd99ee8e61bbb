"""Word lists: names, places, things in categories, common words.

Knows nothing of skills.
Read by the skill modules.
"""

from __future__ import annotations

from demo.corpus.texts import read

_LISTS = read("lexicon")
FIRST_NAMES: tuple[str, ...] = tuple(_LISTS["first_names"])
LAST_NAMES: tuple[str, ...] = tuple(_LISTS["last_names"])
CITIES: tuple[str, ...] = tuple(_LISTS["cities"])
JOBS: tuple[str, ...] = tuple(_LISTS["jobs"])
PRODUCTS: tuple[str, ...] = tuple(_LISTS["products"])
WORDS: tuple[str, ...] = tuple(_LISTS["words"])
CAPITALS: dict[str, str] = _LISTS["capitals"]
CATEGORIES: dict[str, tuple[str, ...]] = {name: tuple(items) for name, items in _LISTS["categories"].items()}
SERIES: dict[str, tuple[str, ...]] = {name: tuple(items) for name, items in _LISTS["series"].items()}
COMPANIES = tuple(a + b for a in ("Nova", "Blue", "Sun", "Star", "North", "Green", "Silver", "Red")
                  for b in ("soft", "tech", "works", "bank", "lab"))  # fmt: skip
NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)

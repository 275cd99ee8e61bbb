"""The voices of eSpeak NG that speak the corpus: which ones train, which ones are held out, how they vary.

Knows nothing of what is said.
Called by pool.py and evaluate_whisper.py.
"""

from __future__ import annotations

import random

from demo.speech.espeak import Manner

# Chosen before anything was trained: of each family (numbered ones, named ones, series) some.
HELD_OUT = ("m5", "f4", "Andrea", "david", "Hugo", "Mike", "belinda", "paul", "Gene2", "iven3")
TRAINING = (
    "Alex", "Alicia", "Andy", "Annie", "AnxiousAndy", "Demonic", "Denis", "Diogo", "Gene", "Henrique", "Jacky", "Lee",
    "Marco", "Mario", "Michael", "Mr serious", "Nguyen", "Reed", "RicishayMax", "RicishayMax2", "RicishayMax3",
    "Storm", "Tweaky", "UniRobot", "adam", "anika", "anikaRobot", "announcer", "antonio", "aunty", "benjamin",
    "boris", "caleb", "croak", "ed", "edward", "edward2", "f1", "f2", "f3", "f5", "fast", "grandma", "grandpa",
    "gustave", "ian", "iven", "iven2", "iven4", "john", "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4",
    "klatt5", "klatt6", "linda", "m1", "m2", "m3", "m4", "m6", "m7", "m8", "marcelo", "max", "michel", "miguel",
    "mike2", "norbert", "pablo", "pedro", "quincy", "rob", "robert", "robosoft", "robosoft2", "robosoft3",
    "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8", "sandro", "shelby", "steph", "steph2", "steph3",
    "travis", "victor", "whisper", "whisperf", "zac",
)  # fmt: skip
# eSpeak's names; English as in America counts twice.
_ACCENTS = {"en": ("en-us", "en-us", "en", "en-gb-x-rp"), "es": ("es", "es-419"), "ms": ("ms",)}


def draw_accent(rng: random.Random, language: str) -> str:
    """One of the kinds of a language that eSpeak speaks."""
    return rng.choice(_ACCENTS[language])


def draw_manner(rng: random.Random, accent: str, voice: str) -> Manner:
    """This voice, at a speed, a pitch and with gaps of its own."""
    return Manner(
        voice=f"{accent}+{voice}",
        rate=rng.randint(110, 220),
        pitch=rng.randint(25, 75),
        pitch_range=rng.randint(20, 80),
        word_gap=rng.choice((0, 0, 0, rng.randint(1, 12))),
    )

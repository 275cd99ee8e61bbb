"""What the generator makes: exchanges (one prompt, one answer) and conversations (whole chats with tools).

Knows nothing of tokenizers, templates or torch.
Made by the skill modules beside it, collected by mixture.py.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from demo.corpus.texts import templates

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user prompt and its only right answer.

    `key` is the prompt before typing errors and politeness: what is held out is held out in every dress.
    """

    prompt: str
    answer: str
    key: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole chat as the wire carries it; every assistant message is learnt."""

    skill: str
    key: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()


Skill = Callable[[random.Random], Exchange]


def is_held_out(key: str) -> bool:
    """Whether prompts of this key are kept from training, for the scores: one in sixteen, decided by the key alone."""
    return key not in templates("always_learnt") and hashlib.sha256(key.lower().encode()).digest()[0] % 16 == 0

"""Reads the texts/ folder: word lists, questions and answers, and the ways to ask for each skill.

Knows nothing of what they are for.
Called by the skill modules.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def read(name: str) -> dict[str, Any]:
    """The content of one file of the folder, read once."""
    path = Path(__file__).with_name("texts") / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def templates(name: str) -> tuple[str, ...]:
    """The ways to ask that stand under this name in templates.toml."""
    return tuple(read("templates")[name])


def entries(name: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Groups of prompts that have one answer, from talk.toml or server.toml."""
    return tuple((tuple(entry["prompts"]), entry["answer"]) for entry in read(name)["entries"])

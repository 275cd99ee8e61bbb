"""Readers for Dockerfile, .dockerignore and docker-compose.yml: as much of each syntax as these files use.

Knows nothing of what they should say.
Called by test_containers.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `text` is what follows the keyword, on one line."""

    keyword: str
    text: str

    @property
    def flags(self) -> dict[str, str]:
        return dict(re.findall(r"--([a-z-]+)=(\S+)", self.text.partition("[")[0]))

    @property
    def words(self) -> list[str]:
        """The arguments of the exec form, or what the blanks separate, without flags."""
        _, bracket, rest = self.text.partition("[")
        if bracket and self.keyword != "RUN":
            return list(json.loads(bracket + rest))
        return [word for word in self.text.split() if not word.startswith("--")]


def instructions(text: str) -> list[Instruction]:
    """Comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines()]


def stages() -> dict[str, list[Instruction]]:
    """The instructions of each stage by its name, FROM first."""
    found: dict[str, list[Instruction]] = {}
    for instruction in instructions(DOCKERFILE):
        if instruction.keyword == "FROM":
            found[instruction.words[-1]] = []
        if found:
            found[list(found)[-1]].append(instruction)
    return found


def image(target: str) -> list[Instruction]:
    """All instructions that a target consists of, from the first stage it stands on."""
    base = stages()[target][0].words[0]
    return [*(image(base) if base in stages() else []), *stages()[target]]


def last(keyword: str, target: str) -> Instruction:
    return [instruction for instruction in image(target) if instruction.keyword == keyword][-1]


def environment(target: str) -> dict[str, str]:
    given = [word for i in image(target) if i.keyword == "ENV" for word in i.words]
    return dict(word.split("=", 1) for word in given)


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last line that names it, or a folder above it, decides."""
    ignored = False
    names = [path, *(str(parent) for parent in PurePosixPath(path).parents if parent.name)]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!").rstrip("/")
        if pattern and not pattern.startswith("#"):
            quoted = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(quoted, name) for name in names):
                ignored = not line.startswith("!")
    return ignored


def copied_files() -> dict[str, Path]:
    """What COPY puts into /app: the path there, and the file it comes from."""
    found: dict[str, Path] = {}
    for copy in stages()["server"]:
        if copy.keyword != "COPY" or "from" in copy.flags:
            continue
        *sources, target = copy.words
        for pattern in sources:
            matches = sorted(ROOT.glob(pattern))
            assert matches, f"COPY {pattern}: there is no such file"
            for match in matches:
                inside = [match] if match.is_file() else [path for path in match.rglob("*") if path.is_file()]
                base = match.parent if match.is_file() else match
                for path in inside:
                    if not is_ignored(path.relative_to(ROOT).as_posix()):
                        found[str(PurePosixPath(target) / path.relative_to(base).as_posix())] = path
    return found


def interpolated(text: str, variables: dict[str, str]) -> str:
    """`${NAME:-default}`, as compose fills it in."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text)


def services(**variables: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(interpolated(COMPOSE, variables))["services"]
    return found


def seconds(duration: str) -> float:
    """`1h`, `1m30s`, `45s`."""
    assert re.fullmatch(r"(?:[\d.]+[hms])+", duration), duration
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration))

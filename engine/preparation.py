"""What makes steps faster behind, while the server answers with the steps it has.

Knows nothing of how: compile/steps.py compiles them, graphs/steps.py captures them.
Given moments between steps by engine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Preparation(Protocol):
    """Gets steps for certain numbers of rows ready, in pieces of about one step's time."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that compiled code serves."""

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Numbers of rows that a graph serves."""

    @property
    def num_decided(self) -> int:
        """How many numbers of rows compiled code serves, or never will."""

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, when has_work becomes true by itself."""

    def has_work(self) -> bool:
        """Whether advance() has something to do."""

    def advance(self) -> None:
        """Do a piece of it."""

    def close(self) -> None:
        """Drop what was made, and end what runs."""

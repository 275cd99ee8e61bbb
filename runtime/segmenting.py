"""Cuts what a model wrote of one window into timed stretches, by the timestamp tokens it wrote.

Knows nothing of text or of other windows; times are counted in timestamp steps from the window's beginning.
Called by the transcriber.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens [first, stop) of a window's output, spoken from `start` to `end`.

    Args:
        first, stop: of the window's tokens.
        start, end: in timestamp steps from the window's beginning; an `end` of None is the window's.
    """

    first: int
    stop: int
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class WindowCut:
    """The stretches of a window.

    Args:
        stretches: in order.
        next_start: the step from which the next window should listen again, since the model was cut off there in the
            middle of something; None when it heard the window to its end.
    """

    stretches: tuple[Stretch, ...]
    next_start: int | None


def cut_window(token_ids: Sequence[int], first_timestamp_id: int, *, keeps_unfinished: bool) -> WindowCut:
    """The stretches between timestamps, as the published models are read.

    Two timestamps in a row, an end and a beginning, part two stretches. One alone at the very end closes the last
    stretch, and what follows it in the window is silence. Without either, the whole is one stretch.

    Args:
        token_ids: what was written, without the token that ended it.
        first_timestamp_id: of <|0.00|>.
        keeps_unfinished: what follows the last pair without an end of its own is given as a stretch up to the window's
            end; else it is left out, and `next_start` says where to listen again.
    """
    steps = [token_id - first_timestamp_id for token_id in token_ids]
    is_mark = [step >= 0 for step in steps]
    is_closed = is_mark[-2:] == [False, True]
    # Positions of the second timestamp of each pair.
    borders = [i for i in range(1, len(steps)) if is_mark[i - 1] and is_mark[i]]
    if not borders:
        return WindowCut((_whole(steps),), None)
    stretches = [
        Stretch(first, stop, max(steps[first], 0), steps[stop - 1])
        for first, stop in zip([0, *borders[:-1]], borders, strict=True)
    ]
    last = borders[-1]
    if is_closed:
        stretches.append(Stretch(last, len(steps), steps[last], steps[-1]))
        return WindowCut(tuple(stretches), None)
    if keeps_unfinished and last + 1 < len(steps):
        stretches.append(Stretch(last, len(steps), steps[last], None))
        return WindowCut(tuple(stretches), None)
    # The second timestamp of the last pair stays with the stretch it follows: it tells that this one was cut off.
    before = stretches[-1]
    stretches[-1] = Stretch(before.first, last + 1, before.start, before.end)
    return WindowCut(tuple(stretches), steps[last - 1])


def _whole(steps: Sequence[int]) -> Stretch:
    """Everything, from the window's beginning to the last moment that was written, if one was."""
    marks = [step for step in steps if step >= 0]
    return Stretch(0, len(steps), 0, marks[-1] if marks and marks[-1] > 0 else None)

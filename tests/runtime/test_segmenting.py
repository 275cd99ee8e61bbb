"""Windows cut into stretches, against the way transformers cuts them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from runtime.segmenting import Stretch, cut_window

T0 = 100  # the first timestamp


def reference(token_ids: list[int], num_frames: int) -> tuple[list[tuple[list[int], float, float]], int]:
    """Token ids, start and end of each segment, and by how many frames it would go on."""
    nothing: Any = [{}]
    segments, offset = WhisperGenerationMixin._retrieve_segment(
        seek_sequence=torch.tensor(token_ids),
        seek_outputs=nothing,
        time_offset=torch.zeros(1, dtype=torch.float64),
        timestamp_begin=T0,
        seek_num_frames=torch.tensor([num_frames]),
        time_precision=0.02,
        time_precision_features=0.01,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 4, dtype=torch.long),
    )
    return [(s["tokens"].tolist(), float(s["start"]), float(s["end"])) for s in segments], int(offset)


def random_output() -> list[int]:
    """Timestamps that never fall and text, in any arrangement that begins with a timestamp, legal or not."""
    tokens, moment = [T0 + random.choice([0, 0, 7])], 7
    for _ in range(random.randint(0, 14)):
        if random.random() < 0.45:
            moment += random.choice([0, 0, 25, 100])
            tokens.append(T0 + moment)
        else:
            tokens.append(random.randint(1, 90))
    return tokens


def test_stretches_are_those_of_generate() -> None:
    random.seed(3)
    num_frames = 2990
    kinds = set()
    for _ in range(3000):
        token_ids = random_output()
        expected, offset = reference(token_ids, num_frames)
        cut = cut_window(token_ids, T0, keeps_unfinished=False)
        found = [
            (token_ids[s.first : s.stop], s.start * 0.02, num_frames * 0.01 if s.end is None else s.end * 0.02)
            for s in cut.stretches
        ]
        assert [tokens for tokens, _, _ in found] == [tokens for tokens, _, _ in expected], token_ids
        assert [times for _, *times in found] == [pytest.approx(times) for _, *times in expected], token_ids
        assert (num_frames if cut.next_start is None else cut.next_start * 2) == offset, token_ids
        kinds.add((len(cut.stretches) > 1, cut.next_start is None))
    assert len(kinds) == 4


def test_text_without_timestamps_is_one_stretch_to_the_windows_end() -> None:
    assert cut_window([1, 2, 3], T0, keeps_unfinished=False).stretches == (Stretch(0, 3, 0, None),)
    assert cut_window([], T0, keeps_unfinished=True).stretches == (Stretch(0, 0, 0, None),)


def test_what_is_unfinished_is_kept_where_nobody_listens_again() -> None:
    token_ids = [T0, 1, T0 + 50, T0 + 50, 2, 3]
    assert cut_window(token_ids, T0, keeps_unfinished=False).next_start == 50
    kept = cut_window(token_ids, T0, keeps_unfinished=True)
    assert kept.stretches == (Stretch(0, 3, 0, 50), Stretch(3, 6, 50, None))
    assert kept.next_start is None


def test_a_pair_at_the_end_leaves_nothing_unfinished() -> None:
    token_ids = [T0, 1, T0 + 50, T0 + 60]
    for keeps_unfinished in (True, False):
        cut = cut_window(token_ids, T0, keeps_unfinished=keeps_unfinished)
        assert cut.stretches == (Stretch(0, 4, 0, 50),)
        assert cut.next_start == 50


def test_with_unfinished_stretches_every_token_of_text_is_in_one() -> None:
    random.seed(4)
    for _ in range(1000):
        token_ids = random_output()
        stretches = cut_window(token_ids, T0, keeps_unfinished=True).stretches
        covered = [i for s in stretches for i in range(s.first, s.stop)]
        assert len(covered) == len(set(covered))
        assert {i for i, token_id in enumerate(token_ids) if token_id < T0} <= set(covered)

"""The accounting of KV memory never leaks, never exceeds its budget, and never shares across salts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.manager import KVManager
from engine.kv.pool import ClearSlot, CopySlot, ResizeArena, Slot, SlotPool, size_classes
from engine.kv.prefix import BLOCK_SIZE
from engine.sequence import PromptProbe, SamplingParams, Sequence, Source


def _sequence(number: int, prompt: list[int], max_tokens: int = 8, salt: bytes = b"") -> Sequence:
    return Sequence(number, prompt, SamplingParams(max_tokens=max_tokens), arrival_time_s=0.0, cache_salt=salt)


def _manager(budget: int | None = None, largest: int = 256, max_slots: int = 16) -> KVManager:
    return KVManager(SlotPool(size_classes(16, largest), max_slots, budget), is_prefix_caching=True)


def _compute(manager: KVManager, sequence: Sequence) -> None:
    sequence.num_computed_tokens = sequence.num_tokens
    manager.commit(sequence)


def test_size_classes_double_and_end_at_the_longest() -> None:
    assert size_classes(16, 100) == (16, 32, 64, 100)
    assert size_classes(50, 50) == (50,)


def test_a_prefix_of_full_blocks_is_reused_and_the_last_token_always_computed() -> None:
    manager = _manager()
    prompt = list(range(2 * BLOCK_SIZE))
    first = _sequence(0, prompt)
    assert manager.admit(first)
    _compute(manager, first)
    second = _sequence(1, prompt)
    assert manager.admit(second)
    assert second.num_cached_tokens == BLOCK_SIZE  # not two blocks: the last token's logits are wanted
    copies = [op for op in manager.take_ops() if isinstance(op, CopySlot)]
    assert [copy.num_tokens for copy in copies] == [BLOCK_SIZE]


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (31, 0), (32, 1), (70, 2), (127, 3)])
def test_a_probed_token_is_never_reused_until_it_was_told(position: int, expected: int) -> None:
    manager = _manager()
    prompt = list(range(4 * BLOCK_SIZE))
    first = _sequence(0, prompt)
    assert manager.admit(first)
    _compute(manager, first)
    probing = _sequence(1, prompt)
    probing.params = SamplingParams(max_tokens=8, probe=PromptProbe(position, (1,)))
    assert manager.admit(probing)
    assert probing.num_computed_tokens == expected * BLOCK_SIZE
    _compute(manager, probing)
    manager.check_integrity()
    manager.free(probing, can_keep=True)
    probing.output_token_ids.append(5)
    assert manager.admit(probing)
    assert probing.num_computed_tokens == 4 * BLOCK_SIZE
    manager.check_integrity()


def test_an_aligning_sequence_reuses_nothing_and_is_waited_for_by_nobody() -> None:
    manager = _manager()
    prompt = [1] * (6 * BLOCK_SIZE)
    first = _sequence(0, prompt)
    assert manager.admit(first)
    _compute(manager, first)
    aligning = _sequence(1, prompt)
    aligning.params = SamplingParams(max_tokens=0, is_aligning=True)
    assert not manager.is_being_computed(aligning)
    assert manager.admit(aligning)
    assert aligning.num_computed_tokens == 0
    manager.check_integrity()


def test_who_shares_a_long_beginning_waits_until_it_is_computed() -> None:
    manager = _manager()
    first = _sequence(0, [1] * (6 * BLOCK_SIZE))
    same, other, short = _sequence(1, [1] * (6 * BLOCK_SIZE)), _sequence(2, [2] * 200), _sequence(3, [1] * 70)
    elsewhere = _sequence(4, [1] * (6 * BLOCK_SIZE), salt=b"bob")
    assert not manager.is_being_computed(first)
    assert manager.admit(first)
    assert manager.is_being_computed(same)
    assert not any(manager.is_being_computed(sequence) for sequence in (other, short, elsewhere))
    first.num_computed_tokens = 3 * BLOCK_SIZE
    manager.commit(first)
    assert not manager.is_being_computed(same)  # what is left to gain is not worth the wait
    assert manager.admit(same)
    assert same.num_cached_tokens == 3 * BLOCK_SIZE
    manager.check_integrity()
    manager.free(first, can_keep=False)
    manager.free(same, can_keep=False)
    assert not manager.is_being_computed(_sequence(5, [1] * (6 * BLOCK_SIZE)))
    manager.check_integrity()


def test_another_salt_finds_nothing() -> None:
    manager = _manager()
    prompt = list(range(3 * BLOCK_SIZE))
    first = _sequence(0, prompt, salt=b"alice")
    assert manager.admit(first)
    _compute(manager, first)
    manager.free(first, can_keep=True)
    other = _sequence(1, prompt, salt=b"bob")
    assert manager.admit(other)
    assert other.num_cached_tokens == 0
    same = _sequence(2, prompt, salt=b"alice")
    assert manager.admit(same)
    assert same.num_cached_tokens == 2 * BLOCK_SIZE


def test_kv_that_may_be_wrong_is_never_shared() -> None:
    manager = _manager()
    prompt = list(range(2 * BLOCK_SIZE))
    broken = _sequence(0, prompt)
    assert manager.admit(broken)
    _compute(manager, broken)
    manager.free(broken, can_keep=False)
    after = _sequence(1, prompt)
    assert manager.admit(after)
    assert after.num_cached_tokens == 0


def test_growth_moves_a_sequence_and_its_tokens() -> None:
    manager = _manager()
    sequence = _sequence(0, list(range(10)), max_tokens=2)
    assert manager.admit(sequence)
    small = manager.slot_of(sequence)
    _compute(manager, sequence)
    manager.take_ops()
    assert manager.ensure(sequence, 40)
    moved = manager.slot_of(sequence)
    assert (small.capacity, moved.capacity) == (16, 64)
    assert manager.take_ops() == [ResizeArena(64, (), 1, room=16), CopySlot(small, moved, 10)]


def test_kept_sequences_make_room_before_anyone_is_refused() -> None:
    manager = _manager(budget=128)
    for number in range(6):
        sequence = _sequence(number, [number] * 40)
        assert manager.admit(sequence)
        _compute(manager, sequence)
        manager.free(sequence, can_keep=True)
        manager.check_integrity()
    assert manager.num_tokens_allocated <= 128


def test_no_room_is_said_and_changes_nothing_of_running_sequences() -> None:
    manager = _manager(budget=128)
    running = [_sequence(n, [n] * 60, max_tokens=1) for n in range(2)]
    assert all(manager.admit(sequence) for sequence in running)
    assert not manager.admit(_sequence(9, [9] * 20))
    manager.check_integrity()
    assert not manager.ensure(running[0], 65)
    manager.check_integrity()


def test_idle_memory_is_given_back() -> None:
    manager = _manager()
    for number in range(4):
        sequence = _sequence(number, [number] * 200)
        assert manager.admit(sequence)
        _compute(manager, sequence)
        manager.free(sequence, can_keep=True)
    assert manager.num_tokens_allocated >= 4 * 256
    manager.give_back(256)
    assert manager.num_tokens_allocated == 256
    manager.check_integrity()


class _Shadow:
    """Storage that holds token ids instead of tensors, to see that every operation moves the right rows."""

    def __init__(self) -> None:
        self.rows: dict[Slot, list[int]] = {}
        self.sizes: dict[int, int] = {}

    def apply(self, manager: KVManager) -> None:
        for op in manager.take_ops():
            if isinstance(op, CopySlot):
                self.rows[op.target] = self.rows[op.source][: op.num_tokens] + self.rows[op.target][op.num_tokens :]
                continue
            if isinstance(op, ClearSlot):
                self.rows[op.slot] = [-1] * op.slot.capacity
                continue
            assert all(index < self.sizes.get(op.capacity, 0) for index in op.keep)
            kept = [self.rows[Slot(op.capacity, index)] for index in op.keep]
            for slot in [slot for slot in self.rows if slot.capacity == op.capacity]:
                del self.rows[slot]
            for index in range(op.num_slots):
                row = kept[index] if index < len(kept) else [-1] * op.capacity
                self.rows[Slot(op.capacity, index)] = row
            self.sizes[op.capacity] = op.num_slots


def test_another_source_finds_nothing_of_the_decoders() -> None:
    manager = _manager()
    prompt = list(range(3 * BLOCK_SIZE))
    found: list[int] = []
    for number, (salt, key) in enumerate([(b"", b"x"), (b"", b"y"), (b"", b"x"), (b"a", b"x")]):
        # The first block is the prompt's beginning and what was generated.
        reader = _sequence(number, prompt[:-1] if found else prompt[:9], salt=salt)
        reader.source = Source(key, 4)
        assert manager.admit(reader)
        found.append(reader.num_cached_tokens)
        _compute(manager, reader)
        reader.output_token_ids = prompt[len(reader.prompt_token_ids) :]
        assert manager.ensure(reader, 3 * BLOCK_SIZE)
        _compute(manager, reader)
        manager.free(reader, can_keep=True)
        manager.check_integrity()
    assert found == [0, 0, 2 * BLOCK_SIZE, 0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_course_of_events_keeps_tokens_where_they_belong(data: st.DataObject) -> None:
    budget = data.draw(st.sampled_from([None, 200, 300, 700]))
    manager, shadow = _manager(budget, largest=160, max_slots=5), _Shadow()
    running: list[Sequence] = []
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["admit", "admit", "compute", "compute", "grow", "free", "drop", "idle"]))
        if action == "admit":
            # Few distinct beginnings, so that prefixes do meet.
            length = data.draw(st.integers(1, 120))
            start = data.draw(st.integers(0, 1))
            sequence = _sequence(number, [start] * min(length, 70) + [number] * max(0, length - 70))
            if manager.admit(sequence):
                running.append(sequence)
        elif action == "idle":
            manager.give_back(data.draw(st.integers(0, 300)))
        elif running:
            sequence = data.draw(st.sampled_from(running))
            if action == "compute":
                shadow.apply(manager)
                row, length = shadow.rows[manager.slot_of(sequence)], sequence.num_tokens
                done = sequence.num_computed_tokens
                expected = sequence.token_slice(0, length)
                assert row[:done] == expected[:done], "what was computed, copied or moved is not there any more"
                if manager.ensure(sequence, length):
                    shadow.apply(manager)
                    row = shadow.rows[manager.slot_of(sequence)]
                    row[done:length] = expected[done:]
                    _compute(manager, sequence)
            elif action == "grow" and sequence.num_tokens < 159:
                sequence.output_token_ids.append(7)
            elif action in ("free", "drop"):
                running.remove(sequence)
                manager.free(sequence, can_keep=action == "free")
        shadow.apply(manager)
        manager.check_integrity()
    for sequence in running:
        manager.free(sequence, can_keep=False)
    manager.give_back(0)
    manager.check_integrity()
    assert manager.num_tokens_allocated == 0

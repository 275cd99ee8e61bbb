"""The accounting of KV blocks never leaks, never exceeds its budget, never shares across salts or overwrites."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.paged_manager import PagedManager
from engine.kv.paged_pool import BlockPool
from engine.kv.pool import ResizeArena
from engine.kv.prefix import BLOCK_SIZE
from engine.sequence import PromptProbe, SamplingParams, Sequence


def _sequence(number: int, prompt: list[int], max_tokens: int = 8, salt: bytes = b"") -> Sequence:
    return Sequence(number, prompt, SamplingParams(max_tokens=max_tokens), arrival_time_s=0.0, cache_salt=salt)


def _manager(max_blocks: int = 64, *, is_prefix_caching: bool = True) -> PagedManager:
    return PagedManager(BlockPool(max_blocks), is_prefix_caching=is_prefix_caching)


def _compute(manager: PagedManager, sequence: Sequence) -> None:
    sequence.num_computed_tokens = sequence.num_tokens
    manager.commit(sequence)


def _run(manager: PagedManager, sequence: Sequence) -> None:
    assert manager.admit(sequence)
    _compute(manager, sequence)
    manager.free(sequence, can_keep=True)
    manager.check_integrity()


def test_full_blocks_are_shared_and_the_last_token_always_computed() -> None:
    manager = _manager()
    prompt = list(range(2 * BLOCK_SIZE))
    first, second = _sequence(0, prompt), _sequence(1, prompt)
    assert manager.admit(first)
    _compute(manager, first)
    assert manager.admit(second)
    assert second.num_computed_tokens == second.num_cached_tokens == BLOCK_SIZE
    tables = manager.table_of(first), manager.table_of(second)
    assert tables[0][0] == tables[1][0]
    assert not set(tables[0][1:]) & set(tables[1][1:])
    assert manager.num_tokens_used == 2 * BLOCK_SIZE  # the shared block once
    manager.check_integrity()


def test_growth_doubles_within_the_budget() -> None:
    manager = _manager(max_blocks=7)
    sequence = _sequence(0, [1] * 40)
    assert manager.admit(sequence)
    assert manager.take_ops() == [ResizeArena(BLOCK_SIZE, (), 2)]
    assert manager.ensure(sequence, 65)
    assert manager.take_ops() == [ResizeArena(BLOCK_SIZE, (0, 1), 4)]
    assert manager.ensure(sequence, 7 * BLOCK_SIZE)
    assert manager.take_ops() == [ResizeArena(BLOCK_SIZE, (0, 1, 2, 3), 7)]
    assert not manager.ensure(sequence, 7 * BLOCK_SIZE + 1)
    assert manager.can_ever_hold(7 * BLOCK_SIZE)
    assert not manager.can_ever_hold(7 * BLOCK_SIZE + 1)
    assert manager.take_ops() == []
    manager.check_integrity()


def test_the_end_of_the_prefix_used_least_recently_goes_first() -> None:
    manager = _manager(max_blocks=8)
    old, new = [1] * (3 * BLOCK_SIZE), [2] * (3 * BLOCK_SIZE)
    _run(manager, _sequence(0, old))
    _run(manager, _sequence(1, new))
    assert manager.admit(_sequence(2, [3] * (3 * BLOCK_SIZE)))  # 4 blocks: 2 free, 2 of the 6 cached
    again = _sequence(3, new)
    assert manager.admit(again)  # 2 shared, its own at the cost of the rest
    assert again.num_cached_tokens == 2 * BLOCK_SIZE
    manager.check_integrity()
    manager.free(again, can_keep=True)
    last = _sequence(4, old)
    assert manager.admit(last)
    assert last.num_cached_tokens == 0
    manager.check_integrity()


def test_another_salt_finds_nothing() -> None:
    manager = _manager()
    prompt = list(range(3 * BLOCK_SIZE))
    found = []
    for number, salt in enumerate((b"alice", b"bob", b"alice")):
        sequence = _sequence(number, prompt, salt=salt)
        _run(manager, sequence)
        found.append(sequence.num_cached_tokens)
    assert found == [0, 0, 2 * BLOCK_SIZE]


def test_kv_that_may_be_wrong_is_never_shared_but_what_it_began_with_stays() -> None:
    manager = _manager()
    prompt = list(range(4 * BLOCK_SIZE))
    _run(manager, _sequence(0, prompt[: BLOCK_SIZE + 1]))
    broken = _sequence(1, prompt)
    assert manager.admit(broken)
    assert broken.num_cached_tokens == BLOCK_SIZE
    _compute(manager, broken)
    manager.free(broken, can_keep=False)
    manager.check_integrity()
    after = _sequence(2, prompt)
    assert manager.admit(after)
    assert after.num_cached_tokens == BLOCK_SIZE


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (31, 0), (32, 1), (70, 2), (127, 3)])
def test_a_probed_token_is_never_reused_until_it_was_told(position: int, expected: int) -> None:
    manager = _manager()
    prompt = list(range(4 * BLOCK_SIZE))
    _run(manager, _sequence(0, prompt))
    probing = _sequence(1, prompt)
    probing.params = SamplingParams(max_tokens=8, probe=PromptProbe(position, (1,)))
    assert manager.admit(probing)
    assert probing.num_computed_tokens == expected * BLOCK_SIZE


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = _manager(is_prefix_caching=False)
    for number in range(2):
        sequence = _sequence(number, [1] * 100)
        _run(manager, sequence)
        assert sequence.num_cached_tokens == 0
        assert manager.num_tokens_used == 0


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
    manager.free(first, can_keep=False)
    assert not manager.is_being_computed(_sequence(5, [1] * (6 * BLOCK_SIZE)))
    manager.check_integrity()


class _Shadow:
    """Storage that holds token ids instead of tensors, to see that nobody's tokens are moved away or written over."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []

    def apply(self, manager: PagedManager) -> None:
        for op in manager.take_ops():
            assert isinstance(op, ResizeArena)
            kept = [self.blocks[index] for index in op.keep]
            self.blocks = kept + [[-1] * BLOCK_SIZE for _ in range(op.num_slots - len(kept))]

    def read(self, manager: PagedManager, sequence: Sequence) -> list[int]:
        blocks = (self.blocks[index] for index in manager.table_of(sequence))
        return [token for block in blocks for token in block][: sequence.num_computed_tokens]

    def write(self, manager: PagedManager, sequence: Sequence, stop: int) -> None:
        table = manager.table_of(sequence)
        for position in range(sequence.num_computed_tokens, stop):
            token = sequence.token_slice(position, position + 1)[0]
            self.blocks[table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_course_of_events_keeps_tokens_where_they_belong(data: st.DataObject) -> None:
    max_blocks = data.draw(st.sampled_from([6, 10, 24]))
    manager, shadow = _manager(max_blocks), _Shadow()
    running: list[Sequence] = []
    actions = ["admit", "admit", "compute", "compute", "grow", "free", "drop", "idle"]
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(actions))
        if action == "admit":
            # Few distinct beginnings, so that prefixes do meet.
            length, start = data.draw(st.integers(1, 150)), data.draw(st.integers(0, 1))
            salt = data.draw(st.sampled_from([b"", b"x"]))
            prompt = [start + 2 * len(salt)] * min(length, 100) + [number] * max(0, length - 100)
            sequence = _sequence(number, prompt, salt=salt)
            if manager.can_ever_hold(length + 1) and manager.admit(sequence):
                running.append(sequence)
        elif action == "idle":
            manager.give_back(data.draw(st.integers(0, 300)))
        elif running:
            sequence = data.draw(st.sampled_from(running))
            if action == "compute":
                if manager.ensure(sequence, sequence.num_tokens):
                    shadow.apply(manager)
                    stop = data.draw(st.integers(sequence.num_computed_tokens, sequence.num_tokens))
                    shadow.write(manager, sequence, stop)
                    sequence.num_computed_tokens = stop
                    manager.commit(sequence)
            elif action == "grow":
                sequence.output_token_ids.append(7)
            else:
                running.remove(sequence)
                manager.free(sequence, can_keep=action == "free")
        shadow.apply(manager)
        manager.check_integrity()
        for sequence in running:  # after every event, everybody's: a block written over shows at once
            assert shadow.read(manager, sequence) == sequence.token_slice(0, sequence.num_computed_tokens)
    for sequence in running:
        manager.free(sequence, can_keep=True)
    manager.give_back(0)
    manager.check_integrity()
    assert manager.num_tokens_allocated == 0

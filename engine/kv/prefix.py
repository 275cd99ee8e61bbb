"""Which computed blocks of tokens are where, found by what precedes them: the index behind prefix reuse.

Knows nothing of slots, budgets or tensors; no torch here.
Kept by kv/manager.py.

A block's key is a sha256 over the key before it and its own token ids, in a chain that begins with the sequence's salt:
equal keys mean equal tokens from the first one on, and sequences of different salts never meet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from typing import Generic, TypeVar

from engine.sequence import Sequence

BLOCK_SIZE = 32  # tokens; smaller blocks reuse more of a prompt's end, larger ones hash less

Holder = TypeVar("Holder")


def chain(previous: bytes, token_ids: list[int]) -> bytes:
    """The key of a block that follows the one with key `previous` (or a salt): 32 bytes."""
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()


def may_reuse(sequence: Sequence) -> bool:
    """Whether computed tokens serve a sequence: scoring a prompt needs every token's logits, aligning its attention."""
    return sequence.params.num_prompt_logprobs is None and not sequence.params.is_aligning


def block_keys(sequence: Sequence) -> list[bytes]:
    """The keys of a sequence's full blocks up to the first token whose logits are wanted: that one is computed."""
    keys, key = [], sequence.kv_salt
    probe = sequence.params.probe
    stop = sequence.num_tokens - 1 if probe is None or sequence.output_token_ids else probe.position
    for start in range(0, stop + 1 - BLOCK_SIZE, BLOCK_SIZE):
        key = chain(key, sequence.token_slice(start, start + BLOCK_SIZE))
        keys.append(key)
    return keys


class PrefixIndex(Generic[Holder]):
    """Who holds which block, and which blocks somebody is about to compute."""

    def __init__(self) -> None:
        self._holders: dict[bytes, list[Holder]] = {}
        self._promised: Counter[bytes] = Counter()

    def holders(self, key: bytes) -> list[Holder]:
        """Who holds the block, the latest last."""
        return self._holders.get(key, [])

    def publish(self, key: bytes, holder: Holder) -> None:
        """Note that `holder` has the block."""
        self._holders.setdefault(key, []).append(holder)

    def retract(self, key: bytes, holder: Holder) -> None:
        """Note that `holder` has it no more."""
        holders = self._holders[key]
        holders.remove(holder)
        if not holders:
            del self._holders[key]

    def promise(self, keys: list[bytes]) -> None:
        """Note that a running sequence will publish these."""
        self._promised.update(keys)

    def redeem(self, keys: list[bytes]) -> None:
        """Note that it has, or that it never will."""
        for key in keys:
            self._promised[key] -= 1
            if not self._promised[key]:
                del self._promised[key]

    def num_found(self, keys: list[bytes]) -> int:
        """How many leading blocks somebody holds."""
        return next((number for number, key in enumerate(keys) if key not in self._holders), len(keys))

    def is_promised(self, key: bytes) -> bool:
        """Whether somebody is about to compute the block."""
        return key in self._promised

    def check_integrity(self, held: list[tuple[bytes, Holder]], promised: list[bytes]) -> None:
        """Raise AssertionError unless the index says exactly what the holders say."""
        found = [(key, id(holder)) for key, holders in self._holders.items() for holder in holders]
        assert sorted(found) == sorted((key, id(holder)) for key, holder in held), "index and slots disagree"
        assert Counter(promised) == self._promised, "a promised block was forgotten"

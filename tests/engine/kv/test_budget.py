"""A budget over several devices never asks of one of them more than it has."""

from __future__ import annotations

import pytest

from engine.kv.budget import StoreUse, budget_within

ONE_TO_THREE = StoreUse({"a": 100, "b": 300}, 50)


def test_the_device_with_the_least_room_for_its_layers_decides() -> None:
    assert budget_within(None, {"a": 1000, "b": 1000}, [ONE_TO_THREE]) == 1333  # b holds three quarters
    assert budget_within(None, {"a": 100, "b": 1000}, [ONE_TO_THREE]) == 400
    assert budget_within(None, {"a": 1000, "b": 1000, "c": 1}, [ONE_TO_THREE]) == 1333  # c has no layers


def test_stores_share_by_what_their_longest_sequences_take() -> None:
    own, cross = StoreUse({"a": 10}, 100), StoreUse({"b": 10}, 300)
    assert budget_within(None, {"a": 500, "b": 900}, [own, cross]) == 1200  # a quarter and three quarters of it


def test_what_is_asked_for_is_given_or_refused_with_both_numbers() -> None:
    assert budget_within(1200, {"a": 1000, "b": 1000}, [ONE_TO_THREE]) == 1200
    with pytest.raises(ValueError, match=r"--kv-cache-memory 2000: 1500 bytes of it would be on b, where 1000 are"):
        budget_within(2000, {"a": 1000, "b": 1000}, [ONE_TO_THREE])

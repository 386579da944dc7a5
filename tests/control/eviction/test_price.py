"""What a loan is reckoned to cost: all of it at first, little where nothing came back, much where much came back at once."""

from __future__ import annotations

import pytest

from lmcache.control.eviction.history import Part, Stretch
from lmcache.control.eviction.price import CAUTION, EXPERIENCE, GENERATIONS, LEAST, SURGE, WINDOWS, Price

CAPACITY = 100


class Load:
    """Requests for 10 names each; of the clock each name is a step."""

    def __init__(self) -> None:
        self.price = Price(CAPACITY)
        self.now = 0.0

    def news(self, requests: int, evicted: int = 10) -> Load:
        """LRU holds nothing of it, and gives up so much. A loan in each request ended well."""
        for _ in range(requests):
            self.now += 10
            self.price.asked(10, [], CAPACITY, self.now)
            self.price.learn(0, 1, 0, evicted, CAPACITY)
        return self

    def again(self, requests: int, age: float) -> Load:
        """LRU holds all of it, last used so long ago."""
        for _ in range(requests):
            self.now += 10
            stretch = Stretch(self.now - age, 0, 0, 10, list(range(10)), bytes(10))
            self.price.asked(10, [Part(stretch, stretch.names, stretch.uses, 10)], CAPACITY, self.now)
            self.price.learn(0, 0, 10, 0, CAPACITY)
        return self


def test_it_is_all_of_a_loan_until_enough_was_asked_for() -> None:
    load = Load().news(EXPERIENCE)
    assert load.price.value == 1
    assert load.news(1).price.value < LEAST + 0.01


def test_and_until_lru_had_its_turn_often_enough() -> None:
    short = GENERATIONS * CAPACITY // 10 - 1
    load = Load().news(EXPERIENCE, evicted=0).news(short)
    assert load.price.value == 1
    assert load.news(1).price.value < 1


def test_loans_that_are_asked_for_make_it_dearer() -> None:
    load = Load().news(2 * EXPERIENCE)
    for _ in range(4000):
        load.price.learn(1, 4, 0, 0, CAPACITY)
    assert load.price.value == pytest.approx(LEAST + CAUTION * 0.2, abs=0.06)


def test_what_is_used_again_soon_is_no_surge() -> None:
    load = Load().news(2 * EXPERIENCE)
    before = load.price.value
    assert before <= load.again(20, age=20.0).price.value < SURGE / 4


def test_a_surge_of_what_was_long_held_is_remembered_and_then_forgotten() -> None:
    load = Load().news(2 * EXPERIENCE).again(6, age=80.0)
    assert load.price.value == SURGE
    window = 3  # requests, of 10 names each: the first of at least a quarter of 100
    assert load.news((WINDOWS - 2) * window).price.value == SURGE
    assert load.news(4 * window).price.value < SURGE / 2

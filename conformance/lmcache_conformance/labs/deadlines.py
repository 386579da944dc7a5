"""Deadlines that pass in the middle of a call, whatever the machine's speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Deadline:
    """A deadline shortly ahead, which passes when `pass_` is called."""

    def __init__(self) -> None:
        self.at = time.monotonic() + 0.3

    def pass_(self) -> None:
        """Returns when the deadline has passed."""
        time.sleep(max(0.0, self.at - time.monotonic() + 0.01))


class PassesAt(Sequence[T]):
    """A sequence whose item number `at` can be had only after the deadline: whoever iterates over it is late from there on."""

    def __init__(self, items: Sequence[T], at: int, deadline: Deadline) -> None:
        self._items, self._at, self._deadline = items, at, deadline

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        numbers = range(len(self))[index]
        if self._at == numbers if isinstance(numbers, int) else self._at in numbers:
            self._deadline.pass_()
        return self._items[index]

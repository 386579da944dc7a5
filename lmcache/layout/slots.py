"""Vectorised checks of slot mappings, done before anything is copied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lmcache.errors import SlotError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def validate_slots(slots: torch.Tensor, num_slots: int, tokens: int, *, unique: bool) -> torch.Tensor:
    """Checks and returns the slots of the first `tokens` tokens, int64 `(tokens,)`.

    Args:
        slots: one-dimensional integer tensor with at least `tokens` entries in [0, num_slots), or −1 = not resident.
        num_slots: slots of the pool.
        tokens: number of slots needed.
        unique: slots must be distinct (destinations); −1 may be repeated.

    Raises:
        SlotError: wrong type or shape, too few, out of range, or duplicated; the message names slot and position.
    """
    if not isinstance(slots, torch.Tensor) or slots.dtype not in _INTEGERS:
        what = slots.dtype if isinstance(slots, torch.Tensor) else type(slots).__name__
        raise SlotError(f"slots must be a tensor of integers, not {what}")
    if slots.dim() != 1 or slots.shape[0] < tokens:
        raise SlotError(f"slots must have shape ({tokens},) or longer, one per token, not {tuple(slots.shape)}")
    wanted = slots[:tokens].to(torch.int64)
    check_slots(wanted, num_slots, tokens, missing=True, unique=unique)
    return wanted


def check_slots(
    slots: torch.Tensor, num_slots: int, expected: int, *, missing: bool, unique: bool
) -> npt.NDArray[np.int64]:
    """Checks slots and returns them as a host array (without a copy if they are on the host).

    Args:
        expected: required number of slots.
        missing: −1 (not resident) is allowed.
        unique: slots other than −1 must be distinct.

    Raises:
        SlotError: as `validate_slots`.
    """
    if slots.dtype != torch.int64 or slots.shape != (expected,):
        raise SlotError(f"slots must be int64 of shape ({expected},), not {slots.dtype} {tuple(slots.shape)}")
    ids: npt.NDArray[np.int64] = slots.cpu().numpy()
    if not expected:
        return ids
    low, high = int(ids.min()), int(ids.max())
    lowest = -1 if missing else 0
    if low < lowest or high >= num_slots:
        where = int(np.flatnonzero((ids < lowest) | (ids >= num_slots))[0])
        hint = "; -1 (not resident) cannot be read" if ids[where] == -1 else ""
        raise SlotError(f"slot {ids[where]} at position {where} is outside of [0, {num_slots}){hint}")
    if unique:
        # `last` holds the last position of each slot; for a duplicated slot it differs from the first position. The scratch
        # array is not cleared, since only entries written here are read, so the cost does not grow with the pool.
        wanted = ids[ids >= 0] if low < 0 else ids
        last = np.empty(num_slots, dtype=np.int64)
        position = np.arange(len(wanted))
        last[wanted] = position
        twice = np.flatnonzero(last[wanted] != position)
        if len(twice):
            slot = int(wanted[twice[0]])
            first, second = np.flatnonzero(ids == slot)[:2]
            raise SlotError(
                f"slot {slot} is named twice, at positions {first} and {second}; a destination slot holds one token"
            )
    return ids

"""What the tests of kernels share: two memories with guards, naive arithmetic, and engines' pages by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lmcache_kernels import Dim
from lmcache_kernels.rowcopy import RowCopy

GUARD = 64


class Lab:
    """Random bytes on both sides, and a copy between them whose pages are permuted and partly missing.

    a_page, b_row: bytes from a page, a row to the next. `shift`: bytes by which both sides are off their alignment.
    """

    def __init__(
        self,
        dims: tuple[Dim, ...],
        a_page: int,
        b_row: int,
        *,
        layers: int = 2,
        objects: int = 2,
        units: int = 3,
        skip: int = 1,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        pages = objects * units + 2
        self.a = _memory(layers * pages * a_page + 2 * GUARD + shift, seed)
        self.b = _memory(objects * layers * units * b_row + 2 * GUARD + shift, seed + 1)
        places = rng.permutation(pages)[: objects * units].astype(np.int64) * a_page
        places[rng.permutation(objects * units)[: min(skip, objects * units)]] = -1
        start = GUARD + shift
        self.copy = RowCopy(
            a_base=self.a.data_ptr() + start + np.arange(layers, dtype=np.int64) * pages * a_page,
            a_units=places.reshape(objects, units),
            b_base=self.b.data_ptr() + start + np.arange(objects, dtype=np.int64) * layers * units * b_row,
            b_layers=np.arange(layers, dtype=np.int64) * units * b_row,
            b_units=np.arange(units, dtype=np.int64) * b_row,
            dims=dims,
        )

    def wanted(self, into_a: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Both memories after the copy, one byte at a time, from the formula in `RowCopy`'s first sentence."""
        a, b = self.a.clone(), self.b.clone()
        target, source = (a.numpy(), b.numpy()) if into_a else (b.numpy(), a.numpy())
        for x, y in self.places():
            if into_a:
                target[x] = source[y]
            else:
                target[y] = source[x]
        return a, b

    def places(self) -> list[tuple[int, int]]:
        """(index in `a`, index in `b`) of every byte that moves."""
        c, out = self.copy, []
        inside = [
            (
                sum(i * a for i, (_, a, _) in zip(at, c.dims, strict=True)),
                sum(i * d[2] for i, d in zip(at, c.dims, strict=True)),
            )
            for at in itertools.product(*(range(size) for size, _, _ in c.dims))
        ]
        for o, layer, u in itertools.product(range(c.objects), range(c.layers), range(c.units)):
            if c.a_units[o, u] >= 0:
                x = int(c.a_base[layer] + c.a_units[o, u]) - self.a.data_ptr()
                y = int(c.b_base[o] + c.b_layers[layer] + c.b_units[u]) - self.b.data_ptr()
                out += [(x + p, y + q) for p, q in inside]
        return out


def _memory(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@dataclass(frozen=True)
class Page:
    """How an engine keeps one plane of one page of S tokens, H heads and D elements of `e` bytes.

    Attributes:
        dims: (S, H, D, e) → loops against the canonical order slot, head, dim.
        nbytes: (S, H, D, e) → bytes of a page.
        read: (elements of a page, S, H, D) → `(S, H, D)`.
        slots: S must be a multiple of this.
    """

    dims: Callable[[int, int, int, int], tuple[Dim, ...]]
    nbytes: Callable[[int, int, int, int], int]
    read: Callable[[torch.Tensor, int, int, int], torch.Tensor]
    slots: int = 1


def _plain(s: int, h: int, d: int, e: int) -> int:
    return s * h * d * e


PAGES: dict[str, Page] = {
    "packed": Page(
        lambda s, h, d, e: ((s, 2 * d * e, h * d * e), (h, s * 2 * d * e, d * e), (d * e, 1, 1)),
        lambda s, h, d, e: 2 * s * h * d * e,
        lambda t, s, h, d: t.view(h, s, 2 * d)[:, :, :d].permute(1, 0, 2),
    ),
    "NHD": Page(lambda s, h, d, e: ((s * h * d * e, 1, 1),), _plain, lambda t, s, h, d: t.view(s, h, d)),
    "HND": Page(
        lambda s, h, d, e: ((s, d * e, h * d * e), (h, s * d * e, d * e), (d * e, 1, 1)),
        _plain,
        lambda t, s, h, d: t.view(h, s, d).permute(1, 0, 2),
    ),
    "kv split": Page(
        lambda s, h, d, e: ((s * h * d * e, 1, 1),),
        lambda s, h, d, e: 2 * s * h * d * e,
        lambda t, s, h, d: t.view(2, s, h, d)[0],
    ),
    "K transposed": Page(
        lambda s, h, d, e: ((s, e, h * d * e), (h, s * d * e, d * e), (d, s * e, e), (e, 1, 1)),
        _plain,
        lambda t, s, h, d: t.view(h, d, s).permute(2, 0, 1),
    ),
    "AMX K": Page(
        lambda s, h, d, e: (
            (s // 16, 16 * d * e, 16 * h * d * e),
            (16, 2 * e, h * d * e),
            (h, s * d * e, d * e),
            (d // 2, 32 * e, 2 * e),
            (2 * e, 1, 1),
        ),
        _plain,
        lambda t, s, h, d: t.view(h, s // 16, d // 2, 16, 2).permute(1, 3, 0, 2, 4).reshape(s, h, d),
        slots=16,
    ),
    "AMX V": Page(
        lambda s, h, d, e: (
            (s // 2, 32 * e, 2 * h * d * e),
            (2, e, h * d * e),
            (h, s * d * e, d * e),
            (d // 16, s * 16 * e, 16 * e),
            (16, 2 * e, e),
            (e, 1, 1),
        ),
        _plain,
        lambda t, s, h, d: t.view(h, d // 16, s // 2, 16, 2).permute(2, 4, 0, 1, 3).reshape(s, h, d),
        slots=2,
    ),
}

"""Axis strings: how the dimensions of a tensor are named, parsed, and turned into strides per axis.

A string names the tensor's dimensions in order, separated by spaces. `( … )` is one dimension composed of several axes,
row-major inside. `slot/16 … slot%16` (and `dim/2 … dim%2`) split an axis into quotient and remainder that may stand apart.

| axis | meaning |
| --- | --- |
| `block` | page of the pool, named by a block table |
| `batch` | like `block`, for caches whose page is a whole sequence: its tokens are the extent of `slot` |
| `slot` | token inside its page; without `block` or `batch`, the token's place in the pool |
| `head` | kv head (may be left out where there is one) |
| `layer` | position among the group's local layers |
| `kv` | which plane, where one tensor holds several; planes of different size are laid end to end |
| `dim` | element; `latent` and `elem` are other names for it (may be left out where there is one) |
| `one` | a dimension of size 1 |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from lmcache.errors import LayoutError
from lmcache_kernels import Digits

_ALIASES = {"latent": "dim", "elem": "dim"}
_NAMES = ("block", "batch", "slot", "head", "layer", "kv", "dim", "one")
_FACTORED = ("slot", "dim")
_TOKEN = re.compile(r"[()]|[^\s()]+")
_ATOM = re.compile(r"([a-z]+)(?:([/%])(\d+))?")
_MAX_FACTOR = 1 << 20


@dataclass(frozen=True)
class Atom:
    """An axis, or one factor of it: `name/factor` (quotient, `op == "/"`) or `name%factor` (remainder)."""

    name: str
    op: str = ""
    factor: int = 1

    def __str__(self) -> str:
        return f"{self.name}{self.op}{self.factor}" if self.op else self.name


@dataclass(frozen=True)
class Axes:
    """A parsed axis string: per tensor dimension, the atoms it is composed of, major first."""

    dims: tuple[tuple[Atom, ...], ...]

    @staticmethod
    def parse(text: str) -> Axes:
        """Parse and check what can be checked without a tensor; `LayoutError` names the axis at fault."""
        dims: list[tuple[Atom, ...]] = []
        inside: list[Atom] | None = None
        for token in _TOKEN.findall(text):
            if token == "(":
                if inside is not None:
                    raise LayoutError(f"axes {text!r}: '(' inside '( … )'; a dimension is composed once, not nested")
                inside = []
            elif token == ")":
                if not inside:
                    raise LayoutError(f"axes {text!r}: ')' closes nothing, or an empty '( )'")
                dims.append(tuple(inside))
                inside = None
            elif inside is None:
                dims.append((_atom(token, text),))
            else:
                inside.append(_atom(token, text))
        if inside is not None:
            raise LayoutError(f"axes {text!r}: '(' is never closed")
        axes = Axes(tuple(dims))
        axes._check(text)
        return axes

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms in order."""
        return tuple(atom for dim in self.dims for atom in dim)

    @cached_property
    def names(self) -> frozenset[str]:
        """The axes that occur."""
        return frozenset(atom.name for atom in self.atoms)

    @cached_property
    def factors(self) -> dict[str, int]:
        """The factor of each factored axis."""
        return {atom.name: atom.factor for atom in self.atoms if atom.op}

    def __str__(self) -> str:
        text = " ".join(map(str, atoms))
        parts = " × ".join(f"{atom} {found[name][atom]}" for atom in atoms)
        raise LayoutError(f"{label}: dimension {index} ({text}) must be {need} = {parts}, not {extent} of {shape}")


def dim_extent(label: str, dims: Mapping[str, tuple[Atom, ...]], found: Mapping[str, Mapping[Atom, int]]) -> int:
    """Extent of a dimension that all these planes share: a leading `kv` lays them end to end, otherwise all are equal."""
    inner = {name: prod(found[name][a] for a in atoms if a.name != "kv") for name, atoms in dims.items()}
    leading = {atoms[0].name == "kv" for atoms in dims.values()}
    has_kv = {any(a.name == "kv" for a in atoms) for atoms in dims.values()}
    if len(leading) > 1 or len(has_kv) > 1:
        raise LayoutError(f"{label}: axis 'kv' must stand in the same place for planes {', '.join(dims)}")
    if leading == {True}:
        return sum(inner.values())
    if len(set(inner.values())) > 1:
        raise LayoutError(
            f"{label}: planes {', '.join(dims)} share a dimension but need {', '.join(map(str, inner.values()))} of it; "
            "only a leading 'kv', as in '(kv dim)', may have parts of different size"
        )
    return next(iter(inner.values())) * (len(dims) if has_kv == {True} else 1)


def strides_of(
    name: str,
    axes: Mapping[str, Axes],
    found: Mapping[str, Mapping[Atom, int]],
    dim_strides: Sequence[int],
    sizes: Sizes,
) -> Strides:
    """Strides of plane `name` in a tensor with these strides per dimension (bytes)."""
    by_atom: dict[Atom, int] = {}
    offset = 0
    position = list(axes).index(name)
    before = list(axes)[:position]
    known = found[name]
    for index, (atoms, stride) in enumerate(zip(axes[name].dims, dim_strides, strict=True)):
        inner = stride
        for atom in reversed(atoms):
            if atom.name == "kv":
                leading = atom == atoms[0]
                sizes_before = [prod(found[p][a] for a in axes[p].dims[index] if a.name != "kv") for p in before]
                offset += sum(sizes_before) * stride if leading else position * inner
            by_atom[atom] = inner
            inner *= known[atom]
    slot = _digits("slot", by_atom, known)
    block = next((atom for atom in by_atom if atom.name in ("block", "batch")), None)
    if block is not None:
        page, pages = by_atom[block], known[block]
    elif len(slot) == 2:  # a pool of `slot/f … slot%f`: the quotient is the page
        (pages, page), slot = slot[0], slot[1:]
    else:
        (pages, page), slot = slot[0], ()
    return Strides(
        offset,
        by_atom.get(Atom("layer")),
        page,
        by_atom.get(Atom("head"), 0),
        slot,
        _digits("dim", by_atom, known),
        pages,
        prod(size for size, _ in slot),
    )


def _digits(name: str, by_atom: Mapping[Atom, int], known: Mapping[Atom, int]) -> Digits:
    order = {"": 0, "/": 0, "%": 1}
    atoms = sorted((atom for atom in by_atom if atom.name == name), key=lambda atom: order[atom.op])
    return tuple((known[atom], by_atom[atom]) for atom in atoms)

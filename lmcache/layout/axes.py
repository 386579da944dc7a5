"""Axis strings: name the dimensions of a tensor; this module parses them and derives the strides of each axis.

A string names the tensor's dimensions in order, separated by spaces. `( … )` is one dimension composed of several axes,
row-major inside. `slot/16 … slot%16` (and `dim/2 … dim%2`) split an axis into quotient and remainder, which need not be
adjacent.

| axis | meaning |
| --- | --- |
| `block` | page of the pool, selected by a block table |
| `batch` | like `block`, for caches with one page per sequence: the extent of `slot` is the sequence's capacity in tokens |
| `slot` | token within its page; without `block` or `batch`, the token's slot in the pool |
| `head` | kv head (may be omitted if there is one) |
| `layer` | position among the group's local layers |
| `kv` | plane, if one tensor holds several; planes of different size are concatenated |
| `dim` | element; `latent` and `elem` are aliases (may be omitted if there is one) |
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
    """An axis, or one part of a split axis: `name/factor` (quotient, `op == "/"`) or `name%factor` (remainder)."""

    name: str
    op: str = ""
    factor: int = 1

    def __str__(self) -> str:
        return f"{self.name}{self.op}{self.factor}" if self.op else self.name


@dataclass(frozen=True)
class Axes:
    """A parsed axis string: for each tensor dimension, the atoms that compose it, major first."""

    dims: tuple[tuple[Atom, ...], ...]

    @staticmethod
    def parse(text: str) -> Axes:
        """Parses a string and checks what can be checked without a tensor; `LayoutError` names the invalid axis."""
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
        """The axes in use."""
        return frozenset(atom.name for atom in self.atoms)

    @cached_property
    def factors(self) -> dict[str, int]:
        """The factor of each split axis."""
        return {atom.name: atom.factor for atom in self.atoms if atom.op}

    def __str__(self) -> str:
        parts = (" ".join(map(str, dim)) for dim in self.dims)
        return " ".join(f"({p})" if len(d) > 1 else p for p, d in zip(parts, self.dims, strict=True))

    def _check(self, text: str) -> None:
        if not self.dims:
            raise LayoutError("an axis string must name at least one dimension, e.g. 'block slot head dim'")
        by_name: dict[str, list[Atom]] = {}
        for atom in self.atoms:
            by_name.setdefault(atom.name, []).append(atom)
        for name, atoms in by_name.items():
            ops = sorted(atom.op for atom in atoms)
            if name == "one" or ops == [""]:
                continue
            if ops == ["%", "/"]:
                if atoms[0].factor != atoms[1].factor:
                    raise LayoutError(
                        f"axes {text!r}: {atoms[0]} and {atoms[1]} split axis {name!r} by different factors"
                    )
            elif "" in ops or len(ops) > 2 or (len(ops) == 2 and ops[0] == ops[1]):
                raise LayoutError(f"axes {text!r}: axis {name!r} occurs twice ({', '.join(map(str, atoms))})")
            else:
                lost = f"{name}{'%' if ops == ['/'] else '/'}{atoms[0].factor}"
                raise LayoutError(f"axes {text!r}: {atoms[0]} needs its other half {lost!r}")
        if "block" in by_name and "batch" in by_name:
            raise LayoutError(f"axes {text!r}: 'batch' is another name for 'block'; axis 'block' occurs twice")
        if not by_name.keys() & {"slot", "block", "batch"}:
            raise LayoutError(f"axes {text!r}: axis 'slot' is missing: which dimension counts tokens?")


def _atom(token: str, text: str) -> Atom:
    match = _ATOM.fullmatch(token)
    name = match and _ALIASES.get(match[1], match[1])
    if not match or name not in _NAMES:
        known = ", ".join((*_NAMES, *_ALIASES))
        raise LayoutError(
            f"axes {text!r}: unknown axis {token!r}; axes are {known}, factored as in 'slot/16 … slot%16'"
        )
    if not match[2]:
        return Atom(name)
    factor = int(match[3])
    if name not in _FACTORED:
        raise LayoutError(f"axes {text!r}: axis {name!r} cannot be factored, only {' and '.join(_FACTORED)} can")
    if not 1 <= factor <= _MAX_FACTOR:
        raise LayoutError(f"axes {text!r}: {token!r} must have a factor from 1 to {_MAX_FACTOR}")
    return Atom(name, match[2], factor)


@dataclass(frozen=True)
class Sizes:
    """Extents of a plane that are known without the tensor; None = taken from the tensor's shape."""

    heads: int
    layers: int
    elems: int
    block_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Strides:
    """Strides of a plane in a tensor, in bytes; `offset` is relative to the tensor's first element.

    `page` is the stride between pages, `slot` the digits of the tokens within a page; a pool without a `block` axis has
    pages of one token. `layer` is None if the tensor holds one layer.
    """

    offset: int
    layer: int | None
    page: int
    head: int
    slot: Digits
    elem: Digits
    pages: int
    block_tokens: int


def solve(
    label: str, axes: Mapping[str, Axes], sizes: Mapping[str, Sizes], shape: Sequence[int]
) -> dict[str, dict[Atom, int]]:
    """Solves for the extent of every atom of every plane in one tensor of `shape`.

    Args:
        label: the tensor's name in error messages.
        axes: the planes in the tensor, in the order of the `kv` axis.
        sizes: known extents of each plane.
        shape: shape of the tensor.

    Raises:
        LayoutError: shape and axes contradict each other.
    """
    first = next(iter(axes.values()))
    if len(axes) > 1 and "kv" not in first.names:
        raise LayoutError(
            f"{label}: planes {', '.join(axes)} share one tensor, so its axes need 'kv' to tell them apart"
        )
    found: dict[str, dict[Atom, int]] = {}
    for name, plane_axes in axes.items():
        if len(plane_axes.dims) != len(shape):
            raise LayoutError(
                f"{label}: axes {str(plane_axes)!r} of plane {name!r} name {len(plane_axes.dims)} dimensions, "
                f"the tensor has {len(shape)}: {tuple(shape)}"
            )
        found[name] = known_extents(label, name, plane_axes, sizes[name], len(axes))
    for index, extent in enumerate(shape):
        _solve_dim(label, index, int(extent), {n: a.dims[index] for n, a in axes.items()}, found, tuple(shape))
    return found


def known_extents(label: str, name: str, axes: Axes, sizes: Sizes, planes: int) -> dict[Atom, int]:
    """Returns the extents that follow from the spec, block_tokens and tokens; for a dense object, these are all extents."""
    where = f"{label}: axes {str(axes)!r} of plane {name!r}"
    if "head" not in axes.names and sizes.heads != 1:
        raise LayoutError(f"{where}: axis 'head' is missing, and there are {sizes.heads} kv heads")
    if "dim" not in axes.names and sizes.elems != 1:
        raise LayoutError(f"{where}: axis 'dim' is missing, and there are {sizes.elems} elements per head")
    if "slot" not in axes.names and sizes.block_tokens != 1:
        raise LayoutError(f"{where}: axis 'slot' is missing; pages without it hold one token: pass block_tokens=1")
    paged = bool(axes.names & {"block", "batch"})
    known: dict[Atom, int] = {}
    for atom in axes.atoms:
        if atom.name == "dim" and atom.op and sizes.elems % atom.factor:
            raise LayoutError(f"{where}: factor of {str(atom)!r} does not divide axis 'dim' of {sizes.elems} elements")
        if atom.name == "slot" and atom.op and paged and (sizes.block_tokens or 0) % atom.factor:
            raise LayoutError(f"{where}: factor of {str(atom)!r} does not divide block_tokens={sizes.block_tokens}")
        if atom.op == "%":
            known[atom] = atom.factor
        elif atom.name == "dim":
            known[atom] = sizes.elems // atom.factor
        elif atom.name == "slot" and paged and sizes.block_tokens is not None:
            known[atom] = sizes.block_tokens // atom.factor
        elif atom.name == "slot" and not paged and sizes.tokens is not None:
            known[atom] = sizes.tokens // atom.factor
        elif atom.name in ("block", "batch") and sizes.tokens is not None:
            known[atom] = sizes.tokens // (sizes.block_tokens or 1)
        elif atom.name in ("head", "layer", "kv", "one"):
            known[atom] = {"head": sizes.heads, "layer": sizes.layers, "kv": planes, "one": 1}[atom.name]
    return known


def _solve_dim(
    label: str,
    index: int,
    extent: int,
    dims: Mapping[str, tuple[Atom, ...]],
    found: dict[str, dict[Atom, int]],
    shape: tuple[int, ...],
) -> None:
    """Checks one dimension and fills in its extent if exactly one is unknown."""
    for name, atoms in dims.items():
        text = " ".join(map(str, atoms))
        where = f"{label}: dimension {index} ({text})"
        known = found[name]
        unknown = [atom for atom in atoms if atom not in known]
        if len(unknown) > 1:
            raise LayoutError(f"{where} leaves {' and '.join(map(str, unknown))} open; pass block_tokens")
        if unknown:
            rest = prod(known[atom] for atom in atoms if atom in known)
            if extent % rest:
                raise LayoutError(
                    f"{where}: {rest} (all axes but {str(unknown[0])!r}) does not divide {extent} of {shape}"
                )
            known[unknown[0]] = extent // rest
    need = dim_extent(label, dims, found)
    if need != extent:
        name, atoms = next(iter(dims.items()))
        text = " ".join(map(str, atoms))
        parts = " × ".join(f"{atom} {found[name][atom]}" for atom in atoms)
        raise LayoutError(f"{label}: dimension {index} ({text}) must be {need} = {parts}, not {extent} of {shape}")


def dim_extent(label: str, dims: Mapping[str, tuple[Atom, ...]], found: Mapping[str, Mapping[Atom, int]]) -> int:
    """Extent of a dimension shared by these planes: a leading `kv` concatenates them, otherwise all extents are equal."""
    inner = {name: prod(found[name][a] for a in atoms if a.name != "kv") for name, atoms in dims.items()}
    leading = {atoms[0].name == "kv" for atoms in dims.values()}
    has_kv = {any(a.name == "kv" for a in atoms) for atoms in dims.values()}
    if len(leading) > 1 or len(has_kv) > 1:
        raise LayoutError(f"{label}: axis 'kv' must be in the same place for planes {', '.join(dims)}")
    if leading == {True}:
        return sum(inner.values())
    if len(set(inner.values())) > 1:
        raise LayoutError(
            f"{label}: planes {', '.join(dims)} share a dimension but need {', '.join(map(str, inner.values()))} of it; "
            "only a leading 'kv', as in '(kv dim)', may have parts of different size"
        )
    below = {name: prod(found[name][a] for a in atoms[_place_of_kv(atoms) :]) for name, atoms in dims.items()}
    if has_kv == {True} and len(set(below.values())) > 1:
        raise LayoutError(
            f"{label}: planes {', '.join(dims)} would overlap: they have {', '.join(map(str, below.values()))} positions "
            "below 'kv' in one dimension, and need equally many"
        )
    return next(iter(inner.values())) * (len(dims) if has_kv == {True} else 1)


def _place_of_kv(atoms: tuple[Atom, ...]) -> int:
    """Returns the index of the atom after `kv`."""
    return next((index + 1 for index, atom in enumerate(atoms) if atom.name == "kv"), len(atoms))


def strides_of(
    name: str,
    axes: Mapping[str, Axes],
    found: Mapping[str, Mapping[Atom, int]],
    dim_strides: Sequence[int],
    sizes: Sizes,
) -> Strides:
    """Returns the strides of plane `name` in a tensor with the strides `dim_strides` per dimension (bytes)."""
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
    elif len(slot) == 2:  # a pool of `slot/f … slot%f`: the quotient selects the page
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

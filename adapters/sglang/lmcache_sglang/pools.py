"""Describes pages of SGLang's host pools as a `KVSpec` and axes, and proves the axes.

A host pool is one tensor for all layers; its axes depend on `--hicache-mem-layout`:

    layer_first         kv layer slot head dim          MLA: layer slot one latent
    page_first          kv slot layer head dim               slot layer one latent
    page_first_direct   kv block layer slot head dim         block layer slot one latent
    page_head           kv block head slot layer dim         (not for MLA, which has no head axis)

Objects on disk do not depend on the layout, so a page written under one layout can be read under another. Pools of any other
kind are stored as opaque pages, through SGLang's own accessors; these only hit under the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from lmcache.adapter import UnsupportedError
from lmcache.errors import LMCacheError
from lmcache.layout import Layout, PagedKV
from lmcache.layout.proof import Proof, Values, prove
from lmcache.spec import KVSpec, LayerGroup, Numerics, Plane, Rect, dtype_name

MHA = {
    "layer_first": "kv layer slot head dim",
    "page_first": "kv slot layer head dim",
    "page_first_direct": "kv block layer slot head dim",
    "page_head": "kv block head slot layer dim",
}
MLA = {
    "layer_first": "layer slot one latent",
    "page_first": "slot layer one latent",
    "page_first_direct": "block layer slot one latent",
}

SCRATCH_PAGES = 2


@dataclass(frozen=True)
class Rank:
    """Position of a rank: heads are split over `tp_size` ranks, layers over `pp_size` pipeline stages."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1


class Pages(Protocol):
    """Access to the pages of a host pool.

    Attributes:
        spec: describes the contents of a page.
        page_tokens: slots per page in the pool.
        object_tokens: tokens per object, as counted by `spec`.
        label: name of the pool's layout, for logs.
    """

    spec: KVSpec
    page_tokens: int
    object_tokens: int
    label: str

    def prepared(self, slots: torch.Tensor, *, reading: bool) -> tuple[PagedKV, torch.Tensor]:
        """Returns memory to copy whole pages from (`reading`) or to, and the slots in it that stand for the pool's `slots`."""
        ...

    def landed(self, kv: PagedKV, slots: torch.Tensor, pages: int) -> None:
        """Completes a load: copies the first `pages` pages from `kv` into the pool, unless `kv` is the pool's own memory."""
        ...

    def flat(self, page: torch.Tensor) -> tuple[PagedKV, torch.Tensor]:
        """Returns a view of one page outside the pool, flat as returned by `get_data_page`, and its slots."""
        ...


class DirectPages:
    """Pages copied directly from and to the pool's memory.

    Args:
        pool: SGLang's host pool, MHA or MLA.
        model, numerics: as in `KVSpec`.
        rank: the rank that owns the pool.

    Raises:
        UnsupportedError: no axes are known for this pool, or its accessors contradict them.
    """

    def __init__(self, pool: Any, model: str, numerics: Numerics, rank: Rank) -> None:
        axes, planes, heads = _described(pool)
        self.page_tokens = self.object_tokens = int(pool.page_size)
        self.label = str(pool.layout)
        self._shape = tuple(pool.get_data_page(0, flat=False).shape)
        layers = range(int(pool.start_layer), int(pool.start_layer) + int(pool.layer_num))
        replicated = len(planes) == 1
        group = LayerGroup("kv", tuple(layers), planes, heads if replicated else heads * rank.tp_size)
        held = (0, heads) if replicated else (rank.tp_rank * heads, (rank.tp_rank + 1) * heads)
        self.spec = KVSpec(model, (group,), (Rect((layers.start, layers.stop), held),), numerics)
        self.spec.validate()
        self._layout = Layout.parse(axes, block_tokens=self.page_tokens)
        try:
            self._kv = PagedKV(pool.kv_buffer, self._layout)
            self._kv.bind(self.spec)
        except LMCacheError as error:
            raise UnsupportedError(f"the host pool is not {axes!r}: {error}") from None
        proof = prove_by_accessors(pool, self._kv, self.spec)
        if not proof:
            raise UnsupportedError(f"the host pool's own accessors contradict {axes!r}: {proof.reason}")

    def prepared(self, slots: torch.Tensor, *, reading: bool) -> tuple[PagedKV, torch.Tensor]:
        """See `Pages`."""
        return self._kv, slots

    def landed(self, kv: PagedKV, slots: torch.Tensor, pages: int) -> None:
        """See `Pages`."""

    def flat(self, page: torch.Tensor) -> tuple[PagedKV, torch.Tensor]:
        """See `Pages`."""
        return PagedKV(page.view(self._shape), self._layout), torch.arange(self.page_tokens)


class OpaquePages:
    """Pages of a pool without known axes, as raw bytes, through `get_data_page` and `set_from_flat_data_page`.

    Args:
        pool: any host pool with these accessors.
        name: name of the pool, part of every object's key.
        model, numerics: as in `KVSpec`.
        rank: the rank that owns the pool; pages are not shared between ranks.

    Raises:
        UnsupportedError: the pool has no accessors, or a page does not survive a round trip through them.
    """

    def __init__(self, pool: Any, name: str, model: str, numerics: Numerics, rank: Rank) -> None:
        self._pool = pool
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        self.object_tokens = 1
        self.label = f"opaque {getattr(pool, 'layout', '')}".strip()
        try:
            page = pool.get_dummy_flat_data_page()
            self.nbytes = page.numel() * page.element_size()
            _prove_round_trip(pool, page, self.page_tokens)
        except UnsupportedError:
            raise
        except Exception as error:  # some pools have accessors that only raise
            raise UnsupportedError(f"pool {name!r} cannot be read page by page: {error}") from None
        if not self.nbytes:
            raise UnsupportedError(f"pages of pool {name!r} are empty")
        kind = f"{name} {type(pool).__name__} {getattr(pool, 'layout', '')} {getattr(pool, 'dtype', '')} {self.page_tokens}"
        self.spec = opaque_spec(kind, self.nbytes, model, numerics, rank)

    def prepared(self, slots: torch.Tensor, *, reading: bool) -> tuple[PagedKV, torch.Tensor]:
        """See `Pages`: a temporary buffer of contiguous pages, filled from the pool if `reading`."""
        starts = slots[:: self.page_tokens].tolist()
        rows = torch.empty(len(starts), 1, self.nbytes, dtype=torch.uint8)
        if reading:
            for row, start in zip(rows, starts, strict=True):
                row[0] = _bytes(self._pool.get_data_page(start, flat=True))
        return opaque_kv(rows), torch.arange(len(starts))

    def landed(self, kv: PagedKV, slots: torch.Tensor, pages: int) -> None:
        """See `Pages`."""
        (rows,) = cast(list[torch.Tensor], kv.tensors)
        like = self._pool.get_dummy_flat_data_page()
        for number, start in enumerate(slots[:: self.page_tokens].tolist()[:pages]):
            self._pool.set_from_flat_data_page(start, rows[number, 0].clone().view(like.dtype))

    def flat(self, page: torch.Tensor) -> tuple[PagedKV, torch.Tensor]:
        """See `Pages`."""
        return opaque_kv(page.view(-1).view(torch.uint8).view(1, 1, -1)), torch.zeros(1, dtype=torch.int64)


def opaque_spec(kind: str, nbytes: int, model: str, numerics: Numerics, rank: Rank) -> KVSpec:
    """Describes pages of `nbytes` bytes as objects of one 'token'; `kind` identifies everything that affects their layout."""
    layers = (rank.pp_rank, rank.pp_rank + 1)
    group = LayerGroup("page", (rank.pp_rank,), (Plane("page", "uint8", nbytes),), rank.tp_size)
    heads = (rank.tp_rank, rank.tp_rank + 1)
    return KVSpec(f"{model} pool {kind}", (group,), (Rect(layers, heads),), numerics)


def opaque_kv(rows: torch.Tensor) -> PagedKV:
    """Describes memory of shape `(pages, 1, bytes)`: one page per slot."""
    return PagedKV([rows], Layout.parse("slot head dim", block_tokens=1))


def pages_of(pool: Any, name: str, model: str, numerics: Numerics, rank: Rank) -> Pages:
    """Returns `DirectPages` if the layout of a KV pool can be proven, else `OpaquePages`.

    Raises:
        UnsupportedError: neither is possible; with both reasons.
    """
    try:
        if name == "kv":
            return DirectPages(pool, model, numerics, rank)
        return OpaquePages(pool, name, model, numerics, rank)
    except UnsupportedError as error:
        if name != "kv":
            raise
        first = str(error)
    try:
        return OpaquePages(pool, name, model, numerics, rank)
    except UnsupportedError as error:
        raise UnsupportedError(f"{first}; {error}") from None


def _described(pool: Any) -> tuple[str, tuple[Plane, ...], int]:
    """Returns axes, planes and number of heads of a host pool.

    Raises:
        UnsupportedError: its layout is not one of those above.
    """
    buffer, layout = getattr(pool, "kv_buffer", None), str(getattr(pool, "layout", ""))
    if not isinstance(buffer, torch.Tensor):
        raise UnsupportedError(f"the host pool's buffer is a {type(buffer).__name__}, not one tensor")
    if getattr(pool, "_layer_shard_enabled", False):
        raise UnsupportedError("the host pool's layers are sharded over ranks")
    dtype = dtype_name(buffer.dtype)
    if hasattr(pool, "kv_cache_dim"):
        if layout not in MLA:
            raise UnsupportedError(f"no axes are known for an MLA host pool in the layout {layout!r}")
        return MLA[layout], (Plane("latent", dtype, int(pool.kv_cache_dim)),), 1
    if not hasattr(pool, "head_num") or layout not in MHA:
        raise UnsupportedError(f"no axes are known for a {type(pool).__name__} in the layout {layout!r}")
    k, v = int(pool.head_dim), int(getattr(pool, "v_head_dim", pool.head_dim))
    if k != v:
        raise UnsupportedError(f"keys of {k} and values of {v} elements cannot share one tensor")
    return MHA[layout], (Plane("k", dtype, k), Plane("v", dtype, v)), int(pool.head_num)


def prove_by_accessors(pool: Any, kv: PagedKV, spec: KVSpec) -> Proof:
    """Proves the layout: SGLang's own paths write patterns into two pages that our addresses must read, and vice versa.

    Two paths are used, as neither covers everything: the per-layer views for SGLang's transfer kernels (`k_data_refs`, in layouts
    where they are indexed by layer) write, and the page accessors for its storage backends read. Runs before the pool is in
    use; the pages' contents are restored.
    """
    page, layout = int(pool.page_size), str(pool.layout)
    slots = torch.arange(SCRATCH_PAGES * page)
    latent = hasattr(pool, "kv_cache_dim")
    saved = [pool.get_data_page(number * page, flat=True).clone() for number in range(SCRATCH_PAGES)]

    def write(group: int, layer: int, target: torch.Tensor, values: Values) -> None:
        refs = _layer_views(pool, layout, latent)
        for i, tokens in enumerate(values.values()):
            if refs is not None and layout == "page_first_direct":
                refs[i][layer][target // page, target % page] = tokens
            elif refs is not None:
                refs[i][layer][target] = tokens
            else:
                for number in range(SCRATCH_PAGES):
                    view = _page_view(pool.get_data_page(number * page, flat=False), layout, latent)
                    view[i][layer] = tokens[number * page : (number + 1) * page]

    def read(group: int, layer: int, target: torch.Tensor) -> Values:
        pages = []
        for number in range(SCRATCH_PAGES):
            view = _page_view(pool.get_data_page(number * page, flat=False), layout, latent)
            pages.append([part[layer] for part in view])
        names = [plane.name for plane in spec.groups[0].planes]
        return {name: torch.cat([page[i] for page in pages]) for i, name in enumerate(names)}

    try:
        return prove(kv.bind(spec), spec, write, slots, read=read)
    finally:
        for number, content in enumerate(saved):
            pool.set_from_flat_data_page(number * page, content)


def _layer_views(pool: Any, layout: str, latent: bool) -> list[Sequence[torch.Tensor]] | None:
    """Returns SGLang's per-layer views for each plane, or None if their first dimension is not the layer."""
    if latent:
        return [pool.data_refs] if layout in ("layer_first", "page_first") else None
    return [pool.k_data_refs, pool.v_data_refs] if layout != "page_head" else None


def _page_view(page: torch.Tensor, layout: str, latent: bool) -> Sequence[torch.Tensor]:
    """Returns views of a page's planes, each `(layer, slot, head, dim)`; writing to them writes to the pool."""
    parts = [page] if latent else [page[0], page[1]]
    if layout == "page_first":
        return [part.transpose(0, 1) for part in parts]
    if layout == "page_first_direct":
        return [part[0] for part in parts]
    if layout == "page_head":
        return [part[0].permute(2, 1, 0, 3) for part in parts]
    return parts


def _bytes(page: torch.Tensor) -> torch.Tensor:
    return page.contiguous().view(-1).view(torch.uint8)


def _prove_round_trip(pool: Any, page: torch.Tensor, page_tokens: int) -> None:
    """Proves that each page reads back exactly what was written to it, independently of the other page."""
    nbytes = page.numel() * page.element_size()
    starts = [0, page_tokens]
    saved = [pool.get_data_page(start, flat=True).clone() for start in starts]
    if any(old.numel() * old.element_size() != nbytes for old in saved):
        raise UnsupportedError("its pages differ in size from its dummy page")
    try:
        patterns = [torch.randint(0, 256, (nbytes,), dtype=torch.uint8) for _ in starts]
        for start, pattern in zip(starts, patterns, strict=True):
            pool.set_from_flat_data_page(start, pattern.clone().view(page.dtype))
        for start, pattern in zip(starts, patterns, strict=True):
            if not torch.equal(_bytes(pool.get_data_page(start, flat=True)), pattern):
                raise UnsupportedError("a page does not read back what was written to it")
    finally:
        for start, old in zip(starts, saved, strict=True):
            pool.set_from_flat_data_page(start, old)

"""SGLang storages and linkers, each broken in one way that has happened to somebody. `inside_mutants.py` tests them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmcache.format import codec
from lmcache_sglang import compat
from lmcache_sglang.pools import OpaquePages
from lmcache_sglang.storage import Store
from lmcache_sglang.testing.observed import ObservedLinker, ObservedStorage


class IgnoresFailedLoads(ObservedStorage):
    """What was not there, or was damaged, is reported as loaded."""

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        super().batch_get_v1(keys, host_indices, extra_info)
        return [True] * len(keys)


class FindsEverything(ObservedStorage):
    """Looks up nothing, and has what it has."""

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return 0 if self.bypassed else len(keys)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        super().batch_get_v1(keys, host_indices, extra_info)
        return [True] * len(keys)


class LoadsNothing(ObservedStorage):
    """Says that it has loaded, and has not."""

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys)


class KnowsNoWeights(ObservedStorage):
    """All models are one."""

    def __init__(self, *args: Any) -> None:
        compat.identity_of = lambda config: "a model"
        super().__init__(*args)


class _Backwards(Store):
    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        page = self.pages.page_tokens
        return super().set(keys, slots.view(-1, page).flip(0).flatten())


class StoresFromTheWrongEnd(ObservedStorage):
    """The last page under the first one's name."""

    store_of = _Backwards


class _BackwardsWindows(Store):
    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        if isinstance(self.pages, OpaquePages):
            slots = slots.view(-1, self.pages.page_tokens).flip(0).flatten()
        return super().set(keys, slots)


class StoresWindowsFromTheWrongEnd(ObservedStorage):
    """Full attention's pages are right, those of the sliding layers' pool change places."""

    store_of = _BackwardsWindows


class _Shifted(Store):
    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        page = self.pages.page_tokens
        return super().get(keys, slots.view(-1, page).roll(1, dims=1).flatten())


class LoadsTokensShifted(ObservedStorage):
    """Each token of a page in its neighbour's place."""

    store_of = _Shifted


class _Swapped(Store):
    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        done = super().get(keys, slots)
        kv = self.pages._kv.tensors  # type: ignore[attr-defined]
        pages = slots[:: self.pages.page_tokens] // self.pages.page_tokens
        kv[:, pages] = kv[:, pages].flip(0)
        return done


class SwapsKeysAndValues(ObservedStorage):
    """As under a layout that was guessed from a shape."""

    store_of = _Swapped


class _ShortKeys(Store):
    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        return super().set([key[:1] for key in keys], slots)

    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        return super().get([key[:1] for key in keys], slots)

    def leading(self, keys: Sequence[str]) -> int:
        return super().leading([key[:1] for key in keys])


class CutsKeysShort(ObservedStorage):
    """Sixteen names for all pages there are."""

    store_of = _ShortKeys


class SkipsVerification(ObservedStorage):
    """Whatever a file holds is served, if its header can be read."""

    def __init__(self, *args: Any) -> None:
        codec.verify = lambda *_: None  # type: ignore[assignment]
        super().__init__(*args)


# ---------------------------------------------------------------- linkers


class OneRankFails(ObservedLinker):
    """Not broken, but unlucky: what others have loaded is computed on all ranks."""

    def _load(self, *arguments: Any) -> bool:
        super()._load(*arguments)
        return int(self._pool.spec.rects[0].heads[0]) == 0


class LinkerIgnoresFailedLoads(ObservedLinker):
    """What was not there, or was damaged, is reported as loaded."""

    def load(self, rid: str, transfers: list[Any]) -> bool:
        super().load(rid, transfers)
        return True


class LinkerStoresFromTheWrongEnd(ObservedLinker):
    """The last page under the first one's name."""

    def offering(self, text: compat.Text, slots: torch.Tensor) -> None:
        super().offering(text, slots.view(-1, self._page).flip(0).flatten())


class LinkerPutsANodeBeforeItsParents(ObservedLinker):
    """What a node of SGLang's tree holds is taken for the beginning of the prompt."""

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        if self._offered is not None:
            text, slots = self._offered
            own = transfers[0].device_indices
            self._offered = text, torch.cat([own, slots[: len(slots) - len(own)]])
        return super().offload(transfers, session_id)


class LinkerForgetsWhoAsked(ObservedLinker):
    """Tenants are one."""

    def asking(self, text: compat.Text, device_tokens: int, tree: Any) -> None:
        super().asking(text._replace(salt="", extra=""), device_tokens, tree)

    def offering(self, text: compat.Text, slots: torch.Tensor) -> None:
        super().offering(text._replace(salt="", extra=""), slots)

"""SGLang storages and linkers, each with one realistic bug. `inside_mutants.py` tests them."""

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
    """Reports missing or damaged pages as loaded."""

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        super().batch_get_v1(keys, host_indices, extra_info)
        return [True] * len(keys)


class FindsEverything(ObservedStorage):
    """Reports every page as cached without a lookup."""

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return 0 if self.bypassed else len(keys)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        super().batch_get_v1(keys, host_indices, extra_info)
        return [True] * len(keys)


class LoadsNothing(ObservedStorage):
    """Reports pages as loaded without loading them."""

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return [True] * len(keys)


class KnowsNoWeights(ObservedStorage):
    """Uses the same identity for all models."""

    def __init__(self, *args: Any) -> None:
        compat.identity_of = lambda config: "a model"
        super().__init__(*args)


class _Backwards(Store):
    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        page = self.pages.page_tokens
        return super().set(keys, slots.view(-1, page).flip(0).flatten())


class StoresFromTheWrongEnd(ObservedStorage):
    """Stores the last page under the first one's key."""

    store_of = _Backwards


class _BackwardsWindows(Store):
    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        if isinstance(self.pages, OpaquePages):
            slots = slots.view(-1, self.pages.page_tokens).flip(0).flatten()
        return super().set(keys, slots)


class StoresWindowsFromTheWrongEnd(ObservedStorage):
    """Swaps pages of the sliding layers' pool; full attention's pages are right."""

    store_of = _BackwardsWindows


class _Shifted(Store):
    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        page = self.pages.page_tokens
        return super().get(keys, slots.view(-1, page).roll(1, dims=1).flatten())


class LoadsTokensShifted(ObservedStorage):
    """Loads each token of a page into the next token's slot."""

    store_of = _Shifted


class _Swapped(Store):
    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        done = super().get(keys, slots)
        kv = self.pages._kv.tensors  # type: ignore[attr-defined]
        pages = slots[:: self.pages.page_tokens] // self.pages.page_tokens
        kv[:, pages] = kv[:, pages].flip(0)
        return done


class SwapsKeysAndValues(ObservedStorage):
    """Swaps K and V, as with a layout guessed from a shape."""

    store_of = _Swapped


class _ShortKeys(Store):
    def set(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        return super().set([key[:1] for key in keys], slots)

    def get(self, keys: Sequence[str], slots: torch.Tensor) -> list[bool]:
        return super().get([key[:1] for key in keys], slots)

    def leading(self, keys: Sequence[str]) -> int:
        return super().leading([key[:1] for key in keys])


class CutsKeysShort(ObservedStorage):
    """Truncates keys, so that all pages share sixteen of them."""

    store_of = _ShortKeys


class SkipsVerification(ObservedStorage):
    """Serves the contents of any file with a readable header."""

    def __init__(self, *args: Any) -> None:
        codec.verify = lambda *_: None  # type: ignore[assignment]
        super().__init__(*args)


# ---------------------------------------------------------------- linkers


class OneRankFails(ObservedLinker):
    """Not a bug: one rank's load fails, so all ranks must compute."""

    def _load(self, *arguments: Any) -> bool:
        super()._load(*arguments)
        return int(self._pool.spec.rects[0].heads[0]) == 0


class LinkerIgnoresFailedLoads(ObservedLinker):
    """Reports missing or damaged pages as loaded."""

    def load(self, rid: str, transfers: list[Any]) -> bool:
        super().load(rid, transfers)
        return True


class LinkerStoresFromTheWrongEnd(ObservedLinker):
    """Stores the last page under the first one's key."""

    def offering(self, text: compat.Text, slots: torch.Tensor) -> None:
        super().offering(text, slots.view(-1, self._page).flip(0).flatten())


class LinkerPutsANodeBeforeItsParents(ObservedLinker):
    """Treats the contents of a node of SGLang's tree as the beginning of the prompt."""

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        if self._offered is not None:
            text, slots = self._offered
            own = transfers[0].device_indices
            self._offered = text, torch.cat([own, slots[: len(slots) - len(own)]])
        return super().offload(transfers, session_id)


class LinkerForgetsWhoAsked(ObservedLinker):
    """Ignores salts: all tenants share one cache."""

    def asking(self, text: compat.Text, device_tokens: int, tree: Any) -> None:
        super().asking(text._replace(salt="", extra=""), device_tokens, tree)

    def offering(self, text: compat.Text, slots: torch.Tensor) -> None:
        super().offering(text._replace(salt="", extra=""), slots)

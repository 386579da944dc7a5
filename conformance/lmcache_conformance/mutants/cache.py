"""Whole caches with one thing wrong."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmcache import CacheEngine, Config, PagedKV
from lmcache.engine import Slots
from lmcache.errors import FormatError
from lmcache.hit import Hit
from lmcache.keys import Extra, Name, ObjectId
from lmcache.layout import ObjectLayout, translate
from lmcache.ledger import Run
from lmcache.objectfile import HEADER_PROBE, Form, Header, decode_header, verify
from lmcache.objectio import Loaded, ObjectIO
from lmcache.plan import Status
from lmcache.spec import KVSpec, Rect
from lmcache.tiers.base import Range, Read, Result, Tier, Write
from lmcache_conformance.cachebytes import CacheBytesTests
from lmcache_conformance.cachefactory import CacheFactory
from lmcache_conformance.cachefaults import CacheFaultTests
from lmcache_conformance.cachenames import CacheNameTests
from lmcache_conformance.cachepressure import CachePressureTests
from lmcache_conformance.kvlab import CHUNK
from lmcache_conformance.mutants import BEYOND, mutant, skip_row


class _Broken(CacheFactory):
    """Opens a broken cache."""

    cache_class: type[CacheEngine] = CacheEngine
    io_class: type[ObjectIO] | None = None
    settings: Mapping[str, Any] = {}
    """Put in place of what the test asks for."""

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """The broken one."""
        if self.settings:
            given = {s.name: getattr(config, s.name) for s in Config.settings() if config.source(s.name) != "default"}
            changes = {k: v for k, v in self.settings.items() if k != "disk_bytes" or "disk_path" in given}
            config = Config(**(given | changes))
        cache = self.cache_class(config, spec, tiers=tiers)
        if self.io_class is not None:
            cache._transfer._io = self.io_class(spec, config.chunk_tokens, order=config.disk_order)
        return cache


class _Tests(_Broken, CacheNameTests, CacheBytesTests):
    """For what is wrong at all times."""


class _Faults(_Broken, CachePressureTests, CacheFaultTests):
    """For what goes wrong under faults and pressure."""


# ---------------------------------------------------------------- what is read is believed


class _Careless(ObjectIO):
    """Reads header and payload where its own would lie, and checks what it is told to check."""

    checks_id = checks_length = checks_segments = True

    def load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        layout = self._canonical[id.group] if self._order == "canonical" or want is None else want
        start = self._form(layout).payload_offset
        head = memoryview(bytearray(max(start, HEADER_PROBE)))[:start]
        target = self._buffer("load", layout.nbytes)
        ranges = [Range(0, start), Range(start, layout.nbytes)]
        [result] = tier.read_into([Read(id, [head, target.numpy().data.cast("B")], ranges)], deadline=deadline)
        if result.status is not Status.OK:
            return Loaded(result)
        try:
            header = decode_header(head, id if self.checks_id else None)
            if self.checks_length and result.nbytes < start + layout.nbytes:
                raise FormatError("truncated")
            if self.checks_segments:
                verify(header, target.numpy().data.cast("B"))
        except FormatError as error:
            return Loaded(Result(Status.CORRUPT, result.nbytes, str(error)))
        if want is not None and layout.signature != want.signature:
            translate(target, layout, out, want)
            return Loaded(result, want)
        out.copy_(target)
        return Loaded(result, layout)


class _NoIds(_Careless):
    checks_id = False


class _NoLengths(_Careless):
    checks_length = checks_segments = False


class _NoChecksums(_Careless):
    checks_segments = False


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantTrustsTheFileName(_Faults):
    """Whatever lies under a name is served: a file that was renamed, or swapped with another."""

    io_class = _NoIds


@mutant(row="truncated chunk file reported as a full hit; stale pool bytes fill the rest", project="lmcache 0.5.6")
class MutantTruncatedIsAHit(_Faults):
    """The rest of a short file is what lay in the buffer before."""

    io_class = _NoLengths


@mutant(row="flipped bits in a chunk file reported as a full hit", project="lmcache 0.5.6")
class MutantFlippedIsAHit(_Faults):
    """Length and header are right, and nobody looks at the payload."""

    io_class = _NoChecksums


class _MyOrder(ObjectIO):
    def _layout_of(self, header: Header) -> ObjectLayout:
        super()._layout_of(header)
        native = [layout for layout in self._forms if layout.order == "native"]
        return native[0] if native and self._order == "native" else self._canonical[header.group]


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantIgnoresTheWritersOrder(_Tests):
    """Native pages are taken for the reader's own order, whatever the header says."""

    io_class = _MyOrder


class _Mislabels(ObjectIO):
    """Pages go to disk as they are, under a header that calls them canonical."""

    def save(self, tier: Tier, id: ObjectId, payload: torch.Tensor, layout: ObjectLayout) -> Result:
        form: Form = self._form(self._canonical[id.group])
        [result] = tier.write([Write(id, form.encode(id, payload.numpy().data.cast("B")))])
        return result


@mutant(row="wrong output after the server restarts", project="LMCache #4492")
class MutantWrongAfterRestart(_Tests):
    """Right as long as DRAM serves; what a restart reads from disk is in another order than its header says."""

    io_class = _Mislabels


# ---------------------------------------------------------------- names


class _Names(CacheEngine):
    """Names by `self.named(salt, lora)`."""

    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return salt, lora

    def namespace(self, *, salt: str = "", lora: str = "", **more: Any) -> bytes:
        salt, lora = self.named(salt, lora)
        return super().namespace(salt=salt, lora=lora, **more)

    def clear(self, salt: str | None = None) -> int:
        return super().clear(None if salt is None else self.named(salt, "")[0])


class _NoSalt(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return "", lora


class _NoLora(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return salt, ""


class _HashedSalt(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return str(hash(salt)), lora


class _ProcessInName(_Names):
    def named(self, salt: str, lora: str) -> tuple[str, str]:
        return f"{salt}{os.getpid()}", lora


_KEY = "key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt"


@mutant(row=_KEY, project="LMCache #4825")
class MutantTenantsShare(_Tests):
    """The salt is not part of the name."""

    cache_class = _NoSalt


@mutant(row=_KEY, project="SGLang #37160")
class MutantLorasShare(_Tests):
    """The LoRA is not part of the name."""

    cache_class = _NoLora


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #2979")
class MutantHashedNames(_Tests):
    """The salt goes into the name by Python's `hash`."""

    cache_class = _HashedSalt


@mutant(row="a new process on the same folder sees nothing", project="LMCache #1175")
class MutantProcessInTheName(_Tests):
    """The process id is part of the name."""

    cache_class = _ProcessInName


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantAnyNumericsWillDo(_Tests):
    """KV that another engine, backend or instruction set computed is a hit."""

    settings = {"share": "semantic"}  # noqa: RUF012


class _FrozenWeights(CacheEngine):
    def set_weights_version(self, version: str | int) -> None:
        pass


@mutant(row="weights change under one name and old KV is served", project="hot reload, RL, LoRA reload")
class MutantOldWeights(_Tests):
    """New weights do not change the names."""

    cache_class = _FrozenWeights


class _ShortImages(CacheEngine):
    def lookup(self, tokens: Any, *, extras: Sequence[Extra] = (), **names: Any) -> Hit:
        return super().lookup(tokens, extras=_shortened(extras), **names)

    def store(self, tokens: Any, kv: PagedKV, slots: Slots, *, extras: Sequence[Extra] = (), **names: Any) -> int:
        return super().store(tokens, kv, slots, extras=_shortened(extras), **names)


def _shortened(extras: Sequence[Extra]) -> list[Extra]:
    return [extra._replace(digest=extra.digest[:2].ljust(16, b"\0")) for extra in extras]


@mutant(row="16-bit multimodal hash collides: the wrong image's KV", project="LMCache #3301")
class MutantSixteenBitImages(_Tests):
    """Two bytes of an image's digest count."""

    cache_class = _ShortImages


class _RankBlind(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)

        def object_id(name: Name) -> ObjectId:
            return ObjectId.of(name, Rect((0, 1), (0, 1)))

        self._transfer._object_id = object_id  # type: ignore[method-assign]


@mutant(row=_KEY, project="SGLang #10969")
class MutantRanksShare(_Tests):
    """All tensor-parallel ranks read and write the same objects."""

    cache_class = _RankBlind


# ---------------------------------------------------------------- bytes


class _FromTheEnd(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots) -> int:
        if isinstance(slots, torch.Tensor) and hit.tokens:
            slots = slots[: hit.tokens].view(-1, CHUNK).flip(0).reshape(-1)
        return super().retrieve(hit, kv, slots)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantLastChunkFirst(_Tests):
    """Chunks are paired with the engine's blocks from the end."""

    cache_class = _FromTheEnd


class _StoresBlockZero(CacheEngine):
    def store(self, tokens: Any, kv: PagedKV, slots: Slots, **names: Any) -> int:
        if isinstance(slots, torch.Tensor):
            slots = slots.clamp(min=0)
        return super().store(tokens, kv, slots, **names)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantStoresThePlaceholder(_Tests):
    """A slot that is not resident is taken for slot 0."""

    cache_class = _StoresBlockZero


class _LoadsBlockZero(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots) -> int:
        if isinstance(slots, torch.Tensor) and bool((slots == -1).any()) and not bool((slots == 0).any()):
            slots = slots.clone()
            slots[int((slots == -1).nonzero()[0])] = 0
        return super().retrieve(hit, kv, slots)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantLoadsIntoThePlaceholder(_Tests):
    """A token that has no slot is loaded into slot 0."""

    cache_class = _LoadsBlockZero


class _FirstGroupOnly(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots) -> int:
        if not isinstance(slots, torch.Tensor):
            slots = {group: s if group == 0 else torch.full_like(s, -1) for group, s in slots.items()}
        return super().retrieve(hit, kv, slots)


@mutant(
    row="side state (sliding window, Mamba, sparse index) not restored with the hit",
    project="SGLang #38031, LMCache #4247",
)
class MutantWindowIsNotRestored(_Tests):
    """Only the first layer group is loaded."""

    cache_class = _FirstGroupOnly


class _Later(CacheEngine):
    def store(self, tokens: Any, kv: PagedKV, slots: Slots, **names: Any) -> int:
        def work() -> None:
            time.sleep(0.01)
            super(_Later, self).store(tokens, kv, slots, **names)

        thread = threading.Thread(target=work)
        self.__dict__.setdefault("_pending", []).append(thread)
        thread.start()
        return len(tokens) // CHUNK * CHUNK

    def lookup(self, tokens: Any, **names: Any) -> Hit:
        self._settle()
        return super().lookup(tokens, **names)

    def flush(self, *, durable: bool = False, timeout: float = 60.0) -> bool:
        self._settle()
        return super().flush(durable=durable, timeout=timeout)

    def close(self) -> None:
        self._settle()
        super().close()

    def _settle(self) -> None:
        for thread in self.__dict__.pop("_pending", []):
            thread.join()


@mutant(row=BEYOND + "a store goes on reading after it has returned", project="the host's half of vLLM #45704")
class MutantReadsTooLate(_Tests):
    """The copy is made behind the caller's back, who overwrites the source."""

    cache_class = _Later


# ---------------------------------------------------------------- faults


class _AllIsWell(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots) -> int:
        super().retrieve(hit, kv, slots)
        return hit.tokens


@mutant(row="load fails but is reported as success", project="vLLM #52234, LMCache #3388")
class MutantLoadAlwaysSucceeds(_Faults):
    """What was offered is called loaded, whatever came."""

    cache_class = _AllIsWell


class _OffersMore(CacheEngine):
    def lookup(self, tokens: Any, **names: Any) -> Hit:
        hit = super().lookup(tokens, **names)
        if len(tokens) >= hit.tokens + CHUNK and "max_tokens" not in names:
            hit.tokens += CHUNK
            hit.by_tier["dram"] = hit.by_tier.get("dram", 0) + CHUNK
        return hit


@mutant(row=BEYOND + "a hit is reported that is none", project="any adapter that counts wrong")
class MutantOffersOneMore(_Tests):
    """One chunk more is offered than there is."""

    cache_class = _OffersMore


class _BlindOptimist(CacheEngine):
    """Objects count as stored when the copy was tried."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        finish = self._transfer._finish

        def pretend(run: Run, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = "") -> None:
            finish(run, indices, Status.OK if run.job.kind == "store" else status, nbytes, detail)

        self._transfer._finish = pretend  # type: ignore[method-assign]


@mutant(row="a store that failed stays visible", project="LMCache #4991")
class MutantFailedStoreIsOffered(_Faults):
    """There was no memory to store it in, and it is offered."""

    cache_class = _BlindOptimist


class _WritesLate(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        ledger = self._transfer._ledger
        begin = ledger.begin_engine_write

        def always(run: Run) -> bool:
            if not begin(run):
                run.moving += 1
            return True

        ledger.begin_engine_write = always  # type: ignore[method-assign]


@mutant(row="slot evicted or reused while a slow read is in flight", project="Mooncake #850")
class MutantLateLoadStillWrites(_Faults):
    """A load that was given up writes the engine's memory when its read comes back."""

    cache_class = _WritesLate


@mutant(row="a dead or slow remote hangs the engine", project="LMCache #4123 #4676 #4759")
class MutantWaitsForEver(_Faults):
    """No deadline on anything that a tier is asked."""

    settings = {"load_timeout_s": 3600.0, "probe_timeout_s": 3600.0}  # noqa: RUF012
    patience = 3.0


class _LosesFull(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        finish = self._transfer._finish

        def forget(run: Run, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = "") -> None:
            if not (run.job.kind == "spill" and status is Status.FULL):
                finish(run, indices, status, nbytes, detail)

        self._transfer._finish = forget  # type: ignore[method-assign]


@mutant(row="ENOSPC leaves tasks stuck, phantom usage, and no store ever succeeds again", project="lmcache 0.5.6")
class MutantFullDiskStrandsTasks(_Faults):
    """A write that meets a full disk is never ended: its slots stay pinned."""

    cache_class = _LosesFull
    patience = 3.0


# ---------------------------------------------------------------- pressure and reset


class _KeepsLeases(CacheEngine):
    def _release(self, owner: int) -> None:
        pass


@mutant(row="pins leak until nothing can be stored", project="LMCache #1034 #1285 #3187")
class MutantPinsLeak(_Faults):
    """Leases neither end nor expire."""

    cache_class = _KeepsLeases
    settings = {"lease_s": 1e9}  # noqa: RUF012
    patience = 3.0


class _Raises(CacheEngine):
    def store(self, tokens: Any, kv: PagedKV, slots: Slots, **names: Any) -> int:
        if self.stats()["index_slots_free"] < len(tokens) // CHUNK:
            raise MemoryError("the cache is full")
        return super().store(tokens, kv, slots, **names)


@mutant(row="a full RAM tier crashes the engine", project="LMCache #1330")
class MutantFullDramRaises(_Faults):
    """A full cache raises into the engine."""

    cache_class = _Raises


@mutant(row="disk tier grows without bound", project="vLLM #54327 #54779")
class MutantDiskGrows(_Faults):
    """The bound of the disk is not passed on."""

    settings = {"disk_bytes": "100GiB"}  # noqa: RUF012


class _ClearsDram(CacheEngine):
    def clear(self, salt: str | None = None) -> int:
        tiers, self._tiers = self._tiers, []
        try:
            return super().clear(salt)
        finally:
            self._tiers = tiers


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearLeavesTheDisk(_Tests):
    """Memory is cleared; the disk serves on."""

    cache_class = _ClearsDram


class _ClearsDisk(CacheEngine):
    def clear(self, salt: str | None = None) -> int:
        names = [None] if salt is None else [self.namespace(salt=salt)]
        self.flush()
        return sum(tier.clear(name) for tier in self._tiers for name in names)


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearLeavesDram(_Tests):
    """The disk is cleared; memory serves on."""

    cache_class = _ClearsDisk


# ---------------------------------------------------------------- the host


@mutant(
    row="pinned allocation fails on WSL2 / containers and the server will not start", project="LMCache #1063, WSL #8447"
)
class MutantMustPin(_Tests):
    """Starts only where memory can be pinned."""

    settings = {"pin_memory": "always"}  # noqa: RUF012

    def open_cache(self, config: Config, spec: KVSpec, tiers: Sequence[Tier] | None = None) -> CacheEngine:
        """Where there is no GPU nobody pins."""
        if not torch.cuda.is_available():
            return CacheEngine(config, spec, tiers=tiers)
        return super().open_cache(config, spec, tiers)


class _Listens(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._admin = socket.create_server(("0.0.0.0", 0))

    def close(self) -> None:
        self._admin.close()
        super().close()


@mutant(row="unauthenticated admin endpoint on 0.0.0.0 runs scripts", project="LMCache #5128")
class MutantListens(_Tests):
    """A server for administrators, on every address, that nobody asked for."""

    cache_class = _Listens


SKIPPED = (
    skip_row(
        "store reads device memory before the compute stream has written it",
        "needs a device with streams: on a CPU the values are there before `store` is called. Its other half, a copy that "
        "is made after `store` returned, is cache.MutantReadsTooLate.",
    ),
)

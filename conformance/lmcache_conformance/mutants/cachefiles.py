"""Caches that do not verify what they read."""

from __future__ import annotations

import torch

from lmcache.errors import FormatError
from lmcache.format.codec import Loaded, ObjectCodec
from lmcache.format.file import HEADER_PROBE, Form, Header, decode_header, verify
from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout, translate
from lmcache.plan import Status
from lmcache.tiers.base import Range, Read, Result, Tier, Write
from lmcache_conformance.mutants import mutant
from lmcache_conformance.mutants.brokencache import BrokenCacheFaultTests, BrokenCacheTests


class _PartialChecks(ObjectCodec):
    """Reads header and payload at the offsets of its own layout, and performs only the checks that are switched on."""

    checks_id = checks_length = checks_segments = True
    checked = slice(None)  # of the segments

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
                verify(header, target.numpy().data.cast("B"), range(len(header.segments))[self.checked])
        except FormatError as error:
            return Loaded(Result(Status.CORRUPT, result.nbytes, str(error)))
        if want is not None and layout.signature != want.signature:
            translate(target, layout, out, want)
            return Loaded(result, want)
        out.copy_(target)
        return Loaded(result, layout)


class _NoIds(_PartialChecks):
    checks_id = False


class _NoLengths(_PartialChecks):
    checks_length = checks_segments = False


class _NoChecksums(_PartialChecks):
    checks_segments = False


class _NotTheLast(_PartialChecks):
    checked = slice(-1)


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantTrustsTheFileName(BrokenCacheFaultTests):
    """Serves any file under an object's name, even if it was renamed or swapped with another."""

    io_class = _NoIds


@mutant(row="truncated chunk file reported as a full hit; stale pool bytes fill the rest", project="lmcache 0.5.6")
class MutantTruncatedIsAHit(BrokenCacheFaultTests):
    """Serves a truncated file; the rest is what the buffer held before."""

    io_class = _NoLengths


@mutant(row="flipped bits in a chunk file reported as a full hit", project="lmcache 0.5.6")
class MutantFlippedIsAHit(BrokenCacheFaultTests):
    """Checks length and header, not the payload."""

    io_class = _NoChecksums


@mutant(row="flipped bits in a chunk file reported as a full hit", project="lmcache 0.5.6")
class MutantTheLastSegmentIsUnchecked(BrokenCacheFaultTests):
    """Verifies all segments of the payload but the last."""

    io_class = _NotTheLast


class _NamesSuffice(ObjectCodec):
    """Takes a name on a tier for its object."""

    def check(self, tier: Tier, id: ObjectId) -> Status:
        return tier.contains([id])[0].status


@mutant(row="truncated chunk file reported as a full hit; stale pool bytes fill the rest", project="lmcache 0.5.6")
class MutantNamesSuffice(BrokenCacheFaultTests):
    """Skips the write of an object whose name is on the tier, and lets flush vouch for it."""

    io_class = _NamesSuffice


class _OwnOrder(ObjectCodec):
    def _layout_of(self, header: Header) -> ObjectLayout:
        super()._layout_of(header)
        native = [layout for layout in self._forms if layout.order == "native"]
        return native[0] if native and self._order == "native" else self._canonical[header.group]


@mutant(row="a file written on an AMX processor is read on another one", project="vLLM CPU block packing")
class MutantIgnoresTheWritersOrder(BrokenCacheTests):
    """Reads native pages in its own order, whatever order the header specifies."""

    io_class = _OwnOrder


class _Mislabels(ObjectCodec):
    """Writes native pages to disk under a header that labels them canonical."""

    def save(
        self,
        tier: Tier,
        id: ObjectId,
        payload: torch.Tensor,
        layout: ObjectLayout,
        made: bytes | None = None,
        begun: float | None = None,
    ) -> Result:
        form: Form = self._form(self._canonical[id.group])
        [result] = tier.write([Write(id, form.encode(id, payload.numpy().data.cast("B")))])
        return result


@mutant(row="wrong output after the server restarts", project="LMCache #4492")
class MutantWrongAfterRestart(BrokenCacheTests):
    """Right for DRAM hits; after a restart, what is read from disk is in another order than its header specifies."""

    io_class = _Mislabels

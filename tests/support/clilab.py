"""What the tests of commands share: a disk tier's folder with real objects, and how to run a command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import Result

from lmcache.format.file import canonical_form
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import KVSpec
from lmcache.tiers.base import Write
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.folder import relative_path

TOKENS = 16
Run = Callable[..., Result]


class Shelf(NamedTuple):
    """A folder with objects of two namespaces: three chunks of one, two of the other."""

    folder: Path
    ids: list[ObjectId]

    def file(self, index: int) -> Path:
        return self.folder / "objects" / relative_path(self.ids[index])


def fill(folder: Path) -> Shelf:
    """Write five objects into a new folder."""
    spec = KVSpec.uniform("test/model", layers=2, kv_heads=2, head_dim=8, dtype="float16")
    form = canonical_form(spec, 0, TOKENS)
    noise = random.Random(0)
    ids = [
        ObjectId(bytes([n]) * 32, noise.randbytes(32), 0, spec.rects[0], TOKENS, depth)
        for n, depths in ((0xAA, 3), (0xBB, 2))
        for depth in range(depths)
    ]
    tier = DiskTier(folder)
    payloads = [memoryview(noise.randbytes(form.nbytes)) for _ in ids]
    results = tier.write([Write(i, form.encode(i, p)) for i, p in zip(ids, payloads, strict=True)])
    tier.close()
    assert all(result.status is Status.OK for result in results)
    return Shelf(folder, ids)


def parsed(result: Result) -> dict[str, Any]:
    """The JSON object on stdout, which must hold nothing else."""
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value

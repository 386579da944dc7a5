"""Every layout of the design keeps the contract of layouts."""

from __future__ import annotations

import torch

from lmcache_conformance.layoutlab import LABS, Lab, LabLayoutTests, ambiguous, plain

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "uint8")


class TestEveryLayout(LabLayoutTests):
    variants = tuple(LABS)


class TestEveryDtype(LabLayoutTests):
    variants = DTYPES

    def make(self, variant: str) -> Lab:
        return plain("block kv head slot dim", getattr(torch, variant))


class TestTheAmbiguousShape(LabLayoutTests):
    """Two kv heads: `[block, slot, 2, 2·dim]` can be read in two ways."""

    variants = ("head (kv dim)",)
    misreadings = ("block slot kv (head dim)",)

    def make(self, variant: str) -> Lab:
        return ambiguous(variant)

"""The layouts of all known engines, every dtype, and a shape that can be read in two ways."""

import torch

from lmcache_conformance.labs.engine_layouts import LABS, Lab, LabLayoutTests, ambiguous, plain


class TestEngines(LabLayoutTests):
    """One variant per engine and backend."""

    variants = tuple(LABS)


class TestDtypes(LabLayoutTests):
    """The same layout in every dtype: copies preserve the bits of each."""

    variants = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "uint8")

    def make(self, variant: str) -> Lab:
        """See `LayoutTests`."""
        return plain("block kv head slot dim", getattr(torch, variant))


class TestAmbiguousShape(LabLayoutTests):
    """Two kv heads: `[block, slot, 2, 2·dim]` can be read in two ways."""

    variants = ("head (kv dim)",)
    misreadings = ("block slot kv (head dim)",)

    def make(self, variant: str) -> Lab:
        """See `LayoutTests`."""
        return ambiguous(variant)

"""Proof that a hit is what was computed: one suite for any engine adapter, tier, layout or kernel, ours or yours."""

"""Names of tenants, LoRAs and scopes that are alike, but different."""

from __future__ import annotations

ALIKE = (
    "t" * 299 + "a",
    "t" * 299 + "b",
    "t" * 299,
    "t" * 32,
    "t" * 31,
    "Tenant",
    "tenant",
    "tenant\0",
    "tenant\0a",
    "tenant\n",
    "caf\u00e9",  # normalisation forms: composed …
    "cafe\u0301",  # … decomposed …
    "\ufb01n",  # … and a ligature, which compatibility forms take apart
    "fin",
    "stra\u00dfe",  # the same without case
    "strasse",
)
"""Differ after 299 characters, in length, in case, after a NUL, in white space, or in Unicode's form."""


def shown(name: str) -> str:
    """Returns a name in ASCII, shortened in the middle."""
    text = ascii(name)
    return text if len(text) < 50 else f"{text[:20]}…{text[-20:]}"

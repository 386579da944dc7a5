"""Variables that begin like ours and are not: a Kubernetes Service's, and those of the project whose import name is the same."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from lmcache.observe.log import Throttle

PREFIX = "LMCACHE_"

# The kubelet sets these in every pod of the namespace of a Service called `lmcache` or `lmcache-…`:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = re.compile(
    r"LMCACHE_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
    r"|(?P<url>LMCACHE_(?:\w+_)?PORT)"
)

OTHERS = {
    "cache_policy": "policy",
    "chunk_size": "chunk_tokens",
    "local_cpu": "dram_bytes",
    "local_disk": "disk_path",
    "local_disk_path": "disk_path",
    "max_local_cpu_size": "dram_bytes",
    "max_local_disk_size": "disk_bytes",
}
"""Settings of the PyPI project `lmcache` that have a counterpart here, and the counterpart."""

_MISSPELT = 0.8
"""Similarity (difflib) from which an unknown name is one of ours misspelt. No setting of the other project comes near it."""

_LOG = Throttle(every=float("inf"))


def is_service(variable: str, text: str) -> bool:
    """Returns whether Kubernetes has set the variable for a Service."""
    match = _SERVICE.fullmatch(variable)
    if match is None:
        return False
    return match["url"] is None or re.match(r"(?:tcp|udp|sctp)://", text, re.IGNORECASE) is not None


def is_foreign(name: str, known: Collection[str]) -> bool:
    """Returns whether an unknown setting name from the environment is another program's, not one of `known` misspelt."""
    return name in OTHERS or not difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT)


def warn_foreign(names: Iterable[str], known: Collection[str]) -> None:
    """Logs one line, once per process, about variables that are ignored, with what to set instead."""
    found = sorted(names)
    if not found:
        return
    advice = []
    for name in found:
        near = [OTHERS[name]] if name in OTHERS else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if near:
            advice.append(f"{PREFIX}{near[0].upper()} instead of {PREFIX}{name.upper()}")
    _LOG.warning(
        "foreign-variables-ignored",
        tuple(found),
        variables=", ".join(PREFIX + name.upper() for name in found),
        advice="; ".join(["they are no settings of lmcache-sdk: unset them", *(f"set {text}" for text in advice)]),
    )

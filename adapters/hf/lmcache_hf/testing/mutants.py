"""Mutants of the Hugging Face adapter: the conformance suite must fail on every one of them."""

from __future__ import annotations

from typing import Any

import msgspec

from lmcache_conformance.contract import SessionConfig
from lmcache_conformance.engines.faults import FaultTests
from lmcache_conformance.mutants import engine_failures as known
from lmcache_conformance.mutants import skip_row
from lmcache_hf.testing.conformance import HFAdapter


class BrokenAdapter(HFAdapter):
    """The adapter whose sessions are the class `session` of `testing.broken`."""

    def __init__(self, session: str, model: str = "llama") -> None:
        self.name = f"hf, broken: {session}"
        self.capabilities = msgspec.structs.replace(HFAdapter.capabilities, models=(model,), dtypes=("float32",))
        self._session = session

    def open(self, config: SessionConfig) -> Any:
        """Load the model."""
        from lmcache_hf.testing import broken

        return getattr(broken, self._session)(config)


writes_elsewhere = BrokenAdapter("WritesElsewhere")
always_shares = BrokenAdapter("AlwaysShares")

SPOILS_WHAT_ARRIVED = known.EngineFailure(
    "SpoilsWhatArrived",
    "After a load that failed midway, the part that was loaded is corrupted.",
    row="the recompute-after-failed-load path gives wrong output",
    project="vLLM #49250",
    suite=FaultTests,
)
FAILURES = (
    known.IGNORES_FAILED_LOADS,
    known.REPORTS_WHAT_IT_DOES_NOT_USE,
    SPOILS_WHAT_ARRIVED,
    known.NAMES_BY_LENGTH,
    known.TAKES_THE_WRONG_END,
    known.FORGETS_WINDOWS,
    known.SERVES_ONCE,
    known.TIRES,
    known.ENDS_AT_2048,
    known.STORES_ONE_TOO_MANY,
    known.SWAPS_KEYS_AND_VALUES,
    known.MISREADS_THE_DISK,
    known.NAMES_BY_PROCESS,
    known.NAMES_BY_HASH_SEED,
    known.KNOWS_NO_TENANTS,
    known.CUTS_SALTS,
    known.NORMALISES_SALTS,
    known.ENDS_SALTS_AT_NUL,
    known.TRUSTS_THE_NAME,
    known.CLEARS_MEMORY_ONLY,
    known.DEAF_TO_FULL_MEMORY,
)
globals().update(known.engine_mutants(__name__, FAILURES, BrokenAdapter))

SKIPPED = (
    skip_row(
        "unauthenticated admin endpoint on 0.0.0.0 runs scripts",
        "nothing here listens on the network: there is no endpoint to break",
    ),
)

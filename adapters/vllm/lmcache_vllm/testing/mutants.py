"""Mutants of vLLM's connector: the conformance suite must fail on every one of them.

Besides those that any engine can have, there are those that need an engine with blocks, KV cache groups and a prefix cache
of its own. Not here, and why:

- A worker that ignores `skip`: where a chunk is one block, no load touches what vLLM has computed itself; where it is more,
  the load overwrites it with the same values. The adapter's own tests look at the memory.
- A worker that loads into the null block: no window's mask lets anything read it. Storing *from* it is here.
- A connector that stores the last sampled token: it plans a step before that step's token is sampled, so it has no key to
  store it under.
- A clear that leaves out the disk: the connector clears no tier, only the command line does.
- Keys without a dtype or rank: keys are derived from `KVSpec`, see `lmcache_conformance.mutants.keys`.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec

from lmcache_conformance.contract import Capabilities, SessionConfig
from lmcache_conformance.engines.traffic import TrafficTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.mutants import BEYOND
from lmcache_conformance.mutants import engine_failures as known
from lmcache_conformance.mutants.engine_failures import EngineFailure
from lmcache_conformance.suites.cross import CrossTests, Side
from lmcache_vllm.testing.conformance import VLLMAdapter


class BrokenAdapter(VLLMAdapter):
    """The adapter whose engine loads the connector `connector` of `testing.broken`. Does not import vLLM before `open`."""

    def __init__(self, connector: str, model: str = "llama") -> None:
        self.name = f"vllm, broken: {connector}"
        self.capabilities = msgspec.structs.replace(
            VLLMAdapter.capabilities, models=(model,), dtypes=("float32",), tensor_parallel=(1,)
        )
        self._connector = f"lmcache_vllm.testing.broken:{connector}"

    def open(self, config: SessionConfig) -> Any:
        """Start the engine."""
        import lmcache_vllm.testing.environment  # noqa: F401  # before anything of vLLM
        from lmcache_vllm.testing.session import VLLMSession

        class Session(VLLMSession):
            connector = self._connector

        return Session(config)


SHARED = (
    # Detected by its tokens: a load that fails changes the split, and with it the bits.
    replace(known.IGNORES_FAILED_LOADS, suite=TrafficTests),
    known.NAMES_BY_LENGTH,
    known.NAMES_BY_PROCESS,
    known.NAMES_BY_HASH_SEED,
    known.KNOWS_NO_TENANTS,
    known.TRUSTS_THE_NAME,
    known.TAKES_THE_WRONG_END,
    known.FORGETS_WINDOWS,
    replace(
        known.STORES_ONE_TOO_MANY,
        meaning="A chunk is stored as soon as its first token is computed.",
        project="chunked prefill",
        suite=TrafficTests,
        tests=(TrafficTests.test_prompts_that_the_engine_splits_are_cached_right,),
    ),
    known.SERVES_ONCE,
    known.SWAPS_KEYS_AND_VALUES,
    known.MISREADS_THE_DISK,
    known.REPORTS_WHAT_IT_DOES_NOT_USE,
    known.DEAF_TO_FULL_MEMORY,
)
OWN = (
    EngineFailure(
        "ReportsTooLittleLost",
        "Of a load that failed, only the last block is reported as lost; earlier ones that never arrived count as computed.",
        row="the recompute-after-failed-load path gives wrong output",
        project="vLLM #49250",
        suite=TrafficTests,
    ),
    EngineFailure(
        "OffersAgain",
        "A load that failed is offered to the same request again, and fails again.",
        row="a failed load is offered again and again",
        project="vLLM #49250",
        suite=TrafficTests,
        settings=MappingProxyType({"timeout_s": 20.0}),
    ),
    EngineFailure(
        "CountsFromItsOwn",
        "A load's blocks are taken for those beyond vLLM's own hit, though they are all of the request's.",
        row=BEYOND + "blocks counted from the engine's own hit",
        project="the connector's allocation callback",
        suite=ValueTests,
        tests=(ValueTests.test_a_hit_may_begin_in_the_engines_own_cache_and_go_on_in_ours,),
    ),
    EngineFailure(
        "MixesGroups",
        "Each KV cache group is loaded into the blocks of the next one.",
        row=BEYOND + "one group's KV in another group's blocks",
        project="hybrid KV cache manager",
        suite=ValueTests,
        model="gemma3",
    ),
    EngineFailure(
        "StoresTheNullBlock",
        "What a sliding window has left behind is stored from the null block.",
        row="garbage stored for, or loaded into, block 0",
        project="hybrid KV cache manager",
        suite=ValueTests,
        tests=(ValueTests.test_in_a_new_process_shorter_prompts_hit_right_after_a_longer_one,),
        model="gemma3",
    ),
    EngineFailure(
        "BelievesTheShape",
        "A layout is derived from a tensor's shape alone. An engine that reads only its own KV does not notice.",
        row="layout misread: with 2 kv heads two layouts have the same shape",
        project="vLLM CPU block packing",
        suite=CrossTests,
        tests=(CrossTests.test_another_engines_kv_gives_the_readers_own_tokens_within_the_bound,),
        settings=MappingProxyType(
            {
                "writer": Side(f"{__name__}:MutantBelievesTheShape.broken"),
                "reader": Side("lmcache_hf.testing.conformance:adapter"),
                "capabilities": Capabilities(semantic=True, logprob_bound=1e-3, same_split=True),
            }
        ),
    ),
)
globals().update(known.engine_mutants(__name__, SHARED + OWN, BrokenAdapter))

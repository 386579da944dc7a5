"""Broken engine adapters: vLLM's connector, with one thing wrong between the cache and the engine.

Of the mutants in `engines`, those that a connector can express; beside them, what can only go wrong where an engine has
blocks, groups and a prefix cache of its own. Not here, and why:

- A worker that ignores `skip`: where a chunk is one block, no load touches what vLLM has itself; where it is more, what it
  overwrites is overwritten by the same values. The adapter's own tests look at the memory.
- A worker that loads into the null block: nothing reads it through a window's mask. What is *stored* from it is here.
- The last sampled token stored: a connector plans a step before its token is sampled, so there is no name to store it by.
- Keys without a dtype or rank: names come from `KVSpec`, `keys` has those mutants.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from lmcache_conformance.contract import Capabilities, SessionConfig
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.names import NameTests
from lmcache_conformance.engines.traffic import TrafficTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.mutants import BEYOND, mutant
from lmcache_conformance.suites.cross import CrossTests, Side


class _Broken:
    """An adapter whose engine loads the connector of that name in `brokenvllm`. Nothing of vLLM is imported before."""

    preload = "lmcache_vllm.testing.preload"
    chunk_tokens = 32
    may_write = ("vllm/modelinfos/*.json",)

    def __init__(self, connector: str, model: str = "llama") -> None:
        self.name = f"vllm, broken: {connector}"
        self._connector = f"lmcache_vllm.testing.broken:{connector}"
        self.capabilities = Capabilities(
            models=(model,),
            dtypes=("float32",),
            logprobs=True,
            same_split=True,
            restart=True,
            salt=True,
            concurrent=True,
            cancel=True,
            preemption=True,
            chunked_prefill=True,
            batch_invariant=False,
            device_cache=True,
            semantic=True,
            logprob_bound=1e-3,
        )

    def why_not(self) -> str | None:
        from lmcache_vllm.testing.conformance import adapter

        return adapter.why_not()

    def open(self, config: SessionConfig) -> Any:
        import lmcache_vllm.testing.environment  # noqa: F401  # before anything of vLLM
        from lmcache_vllm.testing.session import VLLMSession

        class Session(VLLMSession):
            connector = self._connector

        return Session(config)


def _here(name: str) -> str:
    return f"{__name__}:{name}"


ignores_failed_loads = _Broken("IgnoresFailedLoads")
reports_too_little_lost = _Broken("ReportsTooLittleLost")
offers_again = _Broken("OffersAgain")
names_by_length = _Broken("NamesByLength")
names_by_process = _Broken("NamesByProcess")
names_by_hash_seed = _Broken("NamesByHashSeed")
knows_no_tenants = _Broken("KnowsNoTenants")
trusts_the_name = _Broken("TrustsTheName")
takes_the_wrong_end = _Broken("TakesTheWrongEnd")
counts_from_its_own = _Broken("CountsFromItsOwn")
mixes_groups = _Broken("MixesGroups", "gemma3")
forgets_windows = _Broken("ForgetsWindows", "gemma3")
stores_the_null_block = _Broken("StoresTheNullBlock", "gemma3")
stores_one_too_many = _Broken("StoresOneTooMany")
serves_once = _Broken("ServesOnce")
swaps_keys_and_values = _Broken("SwapsKeysAndValues")
believes_the_shape = _Broken("BelievesTheShape")
misreads_the_disk = _Broken("MisreadsTheDisk")
reports_what_it_does_not_use = _Broken("ReportsWhatItDoesNotUse")
clears_memory_only = _Broken("ClearsMemoryOnly")
deaf_to_full_memory = _Broken("DeafToFullMemory")


class _Part(EngineBase):
    """The quick budget, and of the suite only the tests `only`, so that starting engines takes seconds, not minutes."""

    budget: ClassVar[str | None] = "quick"
    only: ClassVar[tuple[str, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if self.only and metafunc.function.__name__ not in self.only:
            metafunc.parametrize("case", [], scope="class")
        else:
            super().pytest_generate_tests(metafunc)


@mutant(row="load fails but is reported as success", project="vLLM #52234, LMCache #3388")
class MutantIgnoresFailedLoads(_Part, TrafficTests):
    """See `brokenvllm.IgnoresFailedLoads`. Judged by tokens: a load that fails changes the split, and so the bits."""

    adapter = _here("ignores_failed_loads")


@mutant(row="the recompute-after-failed-load path gives wrong output", project="vLLM #49250")
class MutantReportsTooLittleLost(_Part, TrafficTests):
    """See `brokenvllm.ReportsTooLittleLost`."""

    adapter = _here("reports_too_little_lost")


@mutant(row="a failed load is offered again and again", project="vLLM #49250")
class MutantOffersAgain(_Part, TrafficTests):
    """See `brokenvllm.OffersAgain`."""

    adapter = _here("offers_again")
    timeout_s = 20.0


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantNamesByLength(_Part, ValueTests):
    """See `brokenvllm.NamesByLength`."""

    adapter = _here("names_by_length")


@mutant(row="a new process on the same folder sees nothing", project="LMCache #562 #1175")
class MutantNamesByProcess(_Part, ValueTests):
    """See `brokenvllm.NamesByProcess`."""

    adapter = _here("names_by_process")
    only = ("test_a_new_process_goes_on_from_disk_alone",)


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #1139 #2136 #2511 #2979")
class MutantNamesByHashSeed(_Part, ValueTests):
    """See `brokenvllm.NamesByHashSeed`."""

    adapter = _here("names_by_hash_seed")
    only = ("test_names_do_not_depend_on_the_process",)


@mutant(row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt", project="vLLM #42125, LMCache #4825")
class MutantKnowsNoTenants(_Part, NameTests):
    """See `brokenvllm.KnowsNoTenants`."""

    adapter = _here("knows_no_tenants")
    only = ("test_tenants_never_share_a_hit", "test_tenants_stay_apart_in_a_new_process")


@mutant(row="weights change under one name and old KV is served", project="hot reload, RL")
class MutantTrustsTheName(_Part, NameTests):
    """See `brokenvllm.TrustsTheName`."""

    adapter = _here("trusts_the_name")


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantTakesTheWrongEnd(_Part, ValueTests):
    """See `brokenvllm.TakesTheWrongEnd`."""

    adapter = _here("takes_the_wrong_end")


@mutant(row=BEYOND + "blocks counted from the engine's own hit", project="the connector's allocation callback")
class MutantCountsFromItsOwn(_Part, ValueTests):
    """See `brokenvllm.CountsFromItsOwn`."""

    adapter = _here("counts_from_its_own")
    only = ("test_a_hit_may_begin_in_the_engines_own_cache_and_go_on_in_ours",)


@mutant(row=BEYOND + "one group's KV in another group's blocks", project="hybrid KV cache manager")
class MutantMixesGroups(_Part, ValueTests):
    """See `brokenvllm.MixesGroups`."""

    adapter = _here("mixes_groups")


@mutant(
    row="side state (sliding window, Mamba, sparse index) not restored with the hit",
    project="SGLang #38031, LMCache #4247",
)
class MutantForgetsWindows(_Part, ValueTests):
    """See `brokenvllm.ForgetsWindows`."""

    adapter = _here("forgets_windows")


@mutant(row="garbage stored for, or loaded into, block 0", project="hybrid KV cache manager")
class MutantStoresTheNullBlock(_Part, ValueTests):
    """See `brokenvllm.StoresTheNullBlock`."""

    adapter = _here("stores_the_null_block")
    only = ("test_in_a_new_process_shorter_prompts_hit_right_after_a_longer_one",)


@mutant(row="rejected draft tokens or the last sampled token stored as if committed", project="chunked prefill")
class MutantStoresOneTooMany(_Part, TrafficTests):
    """See `brokenvllm.StoresOneTooMany`."""

    adapter = _here("stores_one_too_many")
    only = ("test_prompts_that_the_engine_splits_are_cached_right",)


@mutant(row="offloaded cache wrong on the second forward", project="transformers #48947")
class MutantServesOnce(_Part, ValueTests):
    """See `brokenvllm.ServesOnce`."""

    adapter = _here("serves_once")


@mutant(
    row="layout misread: with 2 kv heads two layouts have the same shape", project="LMCache #4463 #4467, dynamo #14416"
)
class MutantSwapsKeysAndValues(_Part, ValueTests):
    """See `brokenvllm.SwapsKeysAndValues`."""

    adapter = _here("swaps_keys_and_values")


@mutant(row="layout misread: with 2 kv heads two layouts have the same shape", project="vLLM CPU block packing")
class MutantBelievesTheShape(_Part, CrossTests):
    """See `brokenvllm.BelievesTheShape`. An engine that misreads its own blocks and nobody else's sees nothing of it."""

    writer, reader = Side(_here("believes_the_shape")), Side("lmcache_hf.testing.conformance:adapter")
    only = ("test_another_engines_kv_gives_the_readers_own_tokens_within_the_bound",)
    capabilities = Capabilities(semantic=True, logprob_bound=1e-3, same_split=True)


@mutant(row="wrong output after the server restarts", project="LMCache #4492")
class MutantMisreadsTheDisk(_Part, ValueTests):
    """See `brokenvllm.MisreadsTheDisk`."""

    adapter = _here("misreads_the_disk")
    only = ("test_a_new_process_goes_on_from_disk_alone",)


@mutant(row="load fails but is reported as success", project="adapters that report what they do not use")
class MutantReportsWhatItDoesNotUse(_Part, ValueTests):
    """See `brokenvllm.ReportsWhatItDoesNotUse`."""

    adapter = _here("reports_what_it_does_not_use")
    only = ("test_a_hit_is_read_from_the_files_and_used",)


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearsMemoryOnly(_Part, NameTests):
    """See `brokenvllm.ClearsMemoryOnly`."""

    adapter = _here("clears_memory_only")
    only = ("test_after_a_clear_nothing_is_served",)


@mutant(row="a full RAM tier crashes the engine", project="LMCache #1330")
class MutantDeafToFullMemory(_Part, TrafficTests):
    """See `brokenvllm.DeafToFullMemory`."""

    adapter = _here("deaf_to_full_memory")
    only = ("test_little_room_costs_hits_and_nothing_else",)

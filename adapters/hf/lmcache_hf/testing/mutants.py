"""Broken engine adapters: the Hugging Face one, with one thing wrong between the cache and the model."""

from __future__ import annotations

from typing import Any, ClassVar

from lmcache_conformance.contract import Capabilities, SessionConfig
from lmcache_conformance.engines.faults import FaultTests
from lmcache_conformance.engines.names import NameTests
from lmcache_conformance.engines.traffic import TrafficTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.mutants import mutant, skip_row


class _Broken:
    """An adapter whose sessions are the class of that name in `brokenhf`."""

    preload = "lmcache_hf.testing.preload"

    def __init__(self, session: str, model: str = "llama") -> None:
        self.name = f"hf, broken: {session}"
        self._session = session
        self.capabilities = Capabilities(
            models=(model,),
            dtypes=("float32",),
            logprobs=True,
            same_split=True,
            restart=True,
            salt=True,
            semantic=True,
            logprob_bound=1e-3,
        )

    def why_not(self) -> str | None:
        from lmcache_hf.testing.conformance import adapter

        return adapter.why_not()

    def open(self, config: SessionConfig) -> Any:
        from lmcache_hf.testing import broken

        return getattr(broken, self._session)(config)


def _here(name: str) -> str:
    return f"{__name__}:{name}"


ignores_failed_loads = _Broken("IgnoresFailedLoads")
spoils_what_arrived = _Broken("SpoilsWhatArrived")
names_by_length = _Broken("NamesByLength")
takes_the_wrong_end = _Broken("TakesTheWrongEnd")
forgets_windows = _Broken("ForgetsWindows", "gemma3")
serves_once = _Broken("ServesOnce")
stores_one_too_many = _Broken("StoresOneTooMany")
swaps_keys_and_values = _Broken("SwapsKeysAndValues")
misreads_the_disk = _Broken("MisreadsTheDisk")
names_by_process = _Broken("NamesByProcess")
names_by_hash_seed = _Broken("NamesByHashSeed")
knows_no_tenants = _Broken("KnowsNoTenants")
trusts_the_name = _Broken("TrustsTheName")
reports_what_it_does_not_use = _Broken("ReportsWhatItDoesNotUse")
writes_elsewhere = _Broken("WritesElsewhere")
always_shares = _Broken("AlwaysShares")
clears_memory_only = _Broken("ClearsMemoryOnly")
deaf_to_full_memory = _Broken("DeafToFullMemory")


# A mutant runs the part of the suite that is meant to see it, so that all of them take minutes.


class _Quick:
    budget: ClassVar[str | None] = "quick"


@mutant(row="load fails but is reported as success", project="vLLM #52234, LMCache #3388")
class MutantIgnoresFailedLoads(_Quick, FaultTests):
    """See `broken.IgnoresFailedLoads`."""

    adapter = _here("ignores_failed_loads")


@mutant(row="load fails but is reported as success", project="adapters that report what they do not use")
class MutantReportsWhatItDoesNotUse(_Quick, ValueTests):
    """See `broken.ReportsWhatItDoesNotUse`."""

    adapter = _here("reports_what_it_does_not_use")


@mutant(row="the recompute-after-failed-load path gives wrong output", project="vLLM #49250")
class MutantSpoilsWhatArrived(_Quick, FaultTests):
    """See `broken.SpoilsWhatArrived`."""

    adapter = _here("spoils_what_arrived")


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantNamesByLength(_Quick, ValueTests):
    """See `broken.NamesByLength`."""

    adapter = _here("names_by_length")


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantTakesTheWrongEnd(_Quick, ValueTests):
    """See `broken.TakesTheWrongEnd`."""

    adapter = _here("takes_the_wrong_end")


@mutant(
    row="side state (sliding window, Mamba, sparse index) not restored with the hit",
    project="SGLang #38031, LMCache #4247",
)
class MutantForgetsWindows(_Quick, ValueTests):
    """See `broken.ForgetsWindows`."""

    adapter = _here("forgets_windows")


@mutant(row="offloaded cache wrong on the second forward", project="transformers #48947")
class MutantServesOnce(_Quick, ValueTests):
    """See `broken.ServesOnce`."""

    adapter = _here("serves_once")


@mutant(
    row="rejected draft tokens or the last sampled token stored as if committed",
    project="speculative decoding",
)
class MutantStoresOneTooMany(_Quick, ValueTests):
    """See `broken.StoresOneTooMany`."""

    adapter = _here("stores_one_too_many")


@mutant(
    row="layout misread: with 2 kv heads two layouts have the same shape", project="LMCache #4463 #4467, dynamo #14416"
)
class MutantSwapsKeysAndValues(_Quick, ValueTests):
    """See `broken.SwapsKeysAndValues`."""

    adapter = _here("swaps_keys_and_values")


@mutant(row="wrong output after the server restarts", project="LMCache #4492")
class MutantMisreadsTheDisk(_Quick, ValueTests):
    """See `broken.MisreadsTheDisk`."""

    adapter = _here("misreads_the_disk")


@mutant(row="a new process on the same folder sees nothing", project="LMCache #562 #1175")
class MutantNamesByProcess(_Quick, ValueTests):
    """See `broken.NamesByProcess`."""

    adapter = _here("names_by_process")


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #1139 #2136 #2511 #2979")
class MutantNamesByHashSeed(_Quick, ValueTests):
    """See `broken.NamesByHashSeed`."""

    adapter = _here("names_by_hash_seed")


@mutant(row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt", project="vLLM #42125, LMCache #4825")
class MutantKnowsNoTenants(_Quick, NameTests):
    """See `broken.KnowsNoTenants`."""

    adapter = _here("knows_no_tenants")


@mutant(row="weights change under one name and old KV is served", project="hot reload, RL")
class MutantTrustsTheName(_Quick, NameTests):
    """See `broken.TrustsTheName`."""

    adapter = _here("trusts_the_name")


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearsMemoryOnly(_Quick, NameTests):
    """See `broken.ClearsMemoryOnly`."""

    adapter = _here("clears_memory_only")


@mutant(row="a full RAM tier crashes the engine", project="LMCache #1330")
class MutantDeafToFullMemory(_Quick, TrafficTests):
    """See `broken.DeafToFullMemory`."""

    adapter = _here("deaf_to_full_memory")


SKIPPED = (
    skip_row(
        "unauthenticated admin endpoint on 0.0.0.0 runs scripts",
        "nothing here listens on the network: there is no endpoint to break",
    ),
)

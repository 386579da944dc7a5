"""Ways in which an engine's adapter can be wrong, and mutants of them for any engine.

Each failure is declared here once: the known failure it stands for, and the part of the engine suite that must detect it. An
adapter supplies only an engine that is broken in that way, in its module of mutants:

    globals().update(engine_mutants(__name__, [NAMES_BY_LENGTH, SERVES_ONCE], BrokenAdapter))

`BrokenAdapter(name, model)` is an `EngineAdapter` whose engine has the failure called `name`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lmcache_conformance.contract import EngineAdapter
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.faults import FaultTests
from lmcache_conformance.engines.names import NameTests
from lmcache_conformance.engines.traffic import TrafficTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.mutants import mutant, only


@dataclass(frozen=True)
class EngineFailure:
    """One failure of an engine's adapter.

    Attributes:
        name: name of the broken engine; the mutant's class is called `Mutant` + `name`.
        meaning: what goes wrong, the mutant's docstring.
        row, project: see `mutants.Mutant`.
        suite: the part of the engine suite that must fail.
        tests: the tests of `suite` to run, so that a mutant takes seconds; empty: all.
        model: the architecture it shows on.
        settings: attributes of the mutant's class, where those of `suite` do not fit.
    """

    name: str
    meaning: str
    row: str
    project: str
    suite: type[EngineBase]
    tests: tuple[Callable[..., None], ...] = ()
    model: str = "llama"
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def engine_mutants(
    module: str, failures: Iterable[EngineFailure], adapter_of: Callable[[str, str], EngineAdapter]
) -> dict[str, type[EngineBase]]:
    """Create one mutant per failure, by class name, for the globals of `module`.

    Each mutant's `broken` is its adapter, so `module:MutantNAME.broken` refers to it from other processes.

    Args:
        module: the `__name__` of the module of mutants.
        failures: what to create mutants of.
        adapter_of: opens the broken engine, given the failure's name and model.
    """
    mutants = [_mutant(module, failure, adapter_of(failure.name, failure.model)) for failure in failures]
    return {suite.__name__: suite for suite in mutants}


def _mutant(module: str, failure: EngineFailure, broken: EngineAdapter) -> type[EngineBase]:
    name, suite = f"Mutant{failure.name}", failure.suite
    attributes = {
        "__doc__": failure.meaning,
        "__module__": module,
        "adapter": f"{module}:{name}.broken",
        "broken": broken,
        "budget": "quick",
    }
    created = type(name, (suite,), {**attributes, **failure.settings})
    if failure.tests:
        only(*failure.tests)(created)
    return mutant(row=failure.row, project=failure.project)(created)


# ---------------------------------------------------------------- failed loads

IGNORES_FAILED_LOADS = EngineFailure(
    "IgnoresFailedLoads",
    "A load that failed is reported as a success: the engine decodes from whatever its memory held.",
    row="load fails but is reported as success",
    project="vLLM #52234, LMCache #3388",
    suite=FaultTests,
)
REPORTS_WHAT_IT_DOES_NOT_USE = EngineFailure(
    "ReportsWhatItDoesNotUse",
    "Everything is computed, and what a lookup finds is reported as a hit.",
    row="load fails but is reported as success",
    project="adapters that report what they do not use",
    suite=ValueTests,
    tests=(ValueTests.test_a_hit_is_read_from_the_files_and_used,),
)

# ---------------------------------------------------------------- names

NAMES_BY_LENGTH = EngineFailure(
    "NamesByLength",
    "KV is keyed by the length of a prompt instead of its tokens: another request's KV is served.",
    row="another request's KV served from disk",
    project="LMCache #4385",
    suite=ValueTests,
)
NAMES_BY_PROCESS = EngineFailure(
    "NamesByProcess",
    "Keys contain the process id: a new process finds nothing that others have written.",
    row="a new process on the same folder sees nothing",
    project="LMCache #562 #1175",
    suite=ValueTests,
    tests=(ValueTests.test_a_new_process_goes_on_from_disk_alone,),
)
NAMES_BY_HASH_SEED = EngineFailure(
    "NamesByHashSeed",
    "Keys depend on PYTHONHASHSEED, which forked processes share and others do not.",
    row="keys differ between processes (hash(None), PYTHONHASHSEED)",
    project="LMCache #1139 #2136 #2511 #2979",
    suite=ValueTests,
    tests=(ValueTests.test_names_do_not_depend_on_the_process,),
)
KNOWS_NO_TENANTS = EngineFailure(
    "KnowsNoTenants",
    "The salt is not part of the key.",
    row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt",
    project="vLLM #42125, LMCache #4825",
    suite=NameTests,
    tests=(NameTests.test_tenants_never_share_a_hit, NameTests.test_tenants_stay_apart_in_a_new_process),
)
CUTS_SALTS = EngineFailure(
    "CutsSalts",
    "Only the first 32 characters of a salt are part of the key.",
    row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt",
    project="fields of fixed size",
    suite=NameTests,
    tests=(NameTests.test_salts_that_differ_late_or_little_are_different_tenants,),
)
NORMALISES_SALTS = EngineFailure(
    "NormalisesSalts",
    "Salts that Unicode regards as equivalent are one tenant.",
    row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt",
    project="text that is normalised on the way",
    suite=NameTests,
    tests=(NameTests.test_salts_that_differ_late_or_little_are_different_tenants,),
)
ENDS_SALTS_AT_NUL = EngineFailure(
    "EndsSaltsAtNul",
    "A salt ends at its first NUL, as strings of C do.",
    row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt",
    project="names that pass through C",
    suite=NameTests,
    tests=(NameTests.test_salts_that_differ_late_or_little_are_different_tenants,),
)
TRUSTS_THE_NAME = EngineFailure(
    "TrustsTheName",
    "A model is identified by its name, whatever its weights are.",
    row="weights change under one name and old KV is served",
    project="hot reload, RL",
    suite=NameTests,
)

# ---------------------------------------------------------------- blocks and contents

TAKES_THE_WRONG_END = EngineFailure(
    "TakesTheWrongEnd",
    "The blocks of a prefix are counted from the end of the prompt: its end is stored as its beginning.",
    row="blocks taken from the wrong end (suffix for prefix)",
    project="dynamo #8419",
    suite=ValueTests,
)
FORGETS_WINDOWS = EngineFailure(
    "ForgetsWindows",
    "A hit restores layers with full attention, and not those with a sliding window.",
    row="side state (sliding window, Mamba, sparse index) not restored with the hit",
    project="SGLang #38031, LMCache #4247",
    suite=ValueTests,
    model="gemma3",
)
STORES_ONE_TOO_MANY = EngineFailure(
    "StoresOneTooMany",
    "The last sampled token, which the model has not processed yet, is stored as if it had KV.",
    row="rejected draft tokens or the last sampled token stored as if committed",
    project="speculative decoding",
    suite=ValueTests,
)
SERVES_ONCE = EngineFailure(
    "ServesOnce",
    "Only the first load returns what was stored.",
    row="offloaded cache wrong on the second forward",
    project="transformers #48947",
    suite=ValueTests,
)
TIRES = EngineFailure(
    "Tires",
    "From the 65th load of a process on, wrong values are returned.",
    row="offloaded cache wrong on the second forward",
    project="rings and counters that wrap",
    suite=ValueTests,
    tests=(ValueTests.test_a_hundred_hits_of_one_process_are_all_right,),
)
ENDS_AT_2048 = EngineFailure(
    "EndsAt2048",
    "Of a load, what is beyond 2,048 tokens is not filled.",
    row="load fails but is reported as success",
    project="buffers and launches of fixed size",
    suite=ValueTests,
    tests=(ValueTests.test_a_prompt_of_thousands_of_tokens_hits_right,),
)
SWAPS_KEYS_AND_VALUES = EngineFailure(
    "SwapsKeysAndValues",
    "K and V, which have the same shape, are swapped.",
    row="layout misread: with 2 kv heads two layouts have the same shape",
    project="LMCache #4463 #4467, dynamo #14416",
    suite=ValueTests,
)
MISREADS_THE_DISK = EngineFailure(
    "MisreadsTheDisk",
    "DRAM hits are right; what is read from disk is interpreted in another layout than it was written in.",
    row="wrong output after the server restarts",
    project="LMCache #4492",
    suite=ValueTests,
    tests=(ValueTests.test_a_new_process_goes_on_from_disk_alone,),
)

# ---------------------------------------------------------------- clear and capacity

CLEARS_MEMORY_ONLY = EngineFailure(
    "ClearsMemoryOnly",
    "`clear` returns, and the disk tier still serves what it held.",
    row="clear returns OK while a tier still serves",
    project="vLLM #57727",
    suite=NameTests,
    tests=(NameTests.test_after_a_clear_nothing_is_served,),
)
DEAF_TO_FULL_MEMORY = EngineFailure(
    "DeafToFullMemory",
    "A store for which DRAM has no room raises in the engine.",
    row="a full RAM tier crashes the engine",
    project="LMCache #1330",
    suite=TrafficTests,
    tests=(TrafficTests.test_little_room_costs_hits_and_nothing_else,),
)

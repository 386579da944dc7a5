"""Run by `test_sglang_mutants.py`: the engine suite on each broken storage. Every class must have a failing test."""

from __future__ import annotations

from typing import Any

from lmcache_conformance.contract import Capabilities, SessionConfig
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.faults import FaultTests
from lmcache_conformance.engines.names import NameTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_sglang.testing.conformance import adapter as sound


class Broken:
    """An adapter whose engine loads the storage of that name in `brokensglang`."""

    preload = "lmcache_sglang.testing.preload"

    def __init__(self, storage: str, model: str = "llama") -> None:
        self.name = f"sglang, broken: {storage}"
        self._storage = f"brokensglang:{storage}"
        self.capabilities = Capabilities(
            models=(model,),
            dtypes=("float32",),
            logprobs=True,
            same_split=True,
            restart=True,
            salt=True,
            batch_invariant=False,
            device_cache=True,
        )

    def why_not(self) -> str | None:
        return sound.why_not()

    def open(self, config: SessionConfig) -> Any:
        from lmcache_sglang.testing.environment import enter

        enter()
        from lmcache_sglang.testing.session import LinkerSession, SGLangSession

        plain = LinkerSession if ":Linker" in self._storage else SGLangSession
        return type("Session", (plain,), {"storage": self._storage})(config)


ignores_failed_loads = Broken("IgnoresFailedLoads")
finds_everything = Broken("FindsEverything")
loads_nothing = Broken("LoadsNothing")
knows_no_weights = Broken("KnowsNoWeights")
stores_from_the_wrong_end = Broken("StoresFromTheWrongEnd")
stores_windows_from_the_wrong_end = Broken("StoresWindowsFromTheWrongEnd", "mellum")
loads_tokens_shifted = Broken("LoadsTokensShifted")
swaps_keys_and_values = Broken("SwapsKeysAndValues")
skips_verification = Broken("SkipsVerification")
cuts_keys_short = Broken("CutsKeysShort")
linker_ignores_failed_loads = Broken("LinkerIgnoresFailedLoads")
linker_stores_from_the_wrong_end = Broken("LinkerStoresFromTheWrongEnd")
linker_puts_a_node_before_its_parents = Broken("LinkerPutsANodeBeforeItsParents")
linker_forgets_who_asked = Broken("LinkerForgetsWhoAsked")


class Values(EngineBase):
    """One test that detects wrong values quickly."""

    test_again = ValueTests.test_asking_again_and_again_changes_nothing


class MutantStoresFromTheWrongEnd(Values):
    adapter = "inside_mutants:stores_from_the_wrong_end"


class MutantStoresWindowsFromTheWrongEnd(Values):
    adapter = "inside_mutants:stores_windows_from_the_wrong_end"


class MutantLoadsTokensShifted(Values):
    adapter = "inside_mutants:loads_tokens_shifted"


class MutantSwapsKeysAndValues(Values):
    adapter = "inside_mutants:swaps_keys_and_values"


class MutantLoadsNothing(EngineBase):
    """Needs a new process: in the old one, host pages still have their contents from before the flush."""

    adapter = "inside_mutants:loads_nothing"
    test_restart = ValueTests.test_a_new_process_goes_on_from_disk_alone
    _goes_on = ValueTests._goes_on


class MutantIgnoresFailedLoads(EngineBase):
    adapter = "inside_mutants:ignores_failed_loads"
    test_damage = FaultTests.test_files_damaged_between_two_processes_are_misses


class MutantSkipsVerification(EngineBase):
    adapter = "inside_mutants:skips_verification"
    test_damage = FaultTests.test_files_damaged_between_two_processes_are_misses


class MutantKnowsNoWeights(EngineBase):
    adapter = "inside_mutants:knows_no_weights"
    test_weights = NameTests.test_other_weights_under_the_same_path_do_not_hit


class MutantCutsKeysShort(EngineBase):
    adapter = "inside_mutants:cuts_keys_short"
    test_miss = ValueTests.test_what_was_never_stored_is_never_a_hit


class MutantFindsEverything(EngineBase):
    adapter = "inside_mutants:finds_everything"
    test_miss = ValueTests.test_what_was_never_stored_is_never_a_hit


class MutantLinkerIgnoresFailedLoads(EngineBase):
    adapter = "inside_mutants:linker_ignores_failed_loads"
    test_damage = FaultTests.test_files_damaged_between_two_processes_are_misses


class MutantLinkerStoresFromTheWrongEnd(Values):
    adapter = "inside_mutants:linker_stores_from_the_wrong_end"


class MutantLinkerPutsANodeBeforeItsParents(EngineBase):
    """Detected when a prompt continues from a node that is already stored."""

    adapter = "inside_mutants:linker_puts_a_node_before_its_parents"
    test_dialogue = ValueTests.test_logits_after_a_hit_are_those_of_recomputation_in_the_same_split


class MutantLinkerForgetsWhoAsked(EngineBase):
    adapter = "inside_mutants:linker_forgets_who_asked"
    test_tenants = NameTests.test_tenants_never_share_a_hit

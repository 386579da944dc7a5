"""The SGLang adapter passes the engine suite: all of it with a Llama model, parts with MLA and with sliding windows."""

import msgspec
import pytest

from lmcache_conformance.contract import Level
from lmcache_conformance.engines import EngineTests
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, same_answer
from lmcache_conformance.engines.faults import FaultTests
from lmcache_conformance.engines.values import ValueTests
from lmcache_conformance.runner.marks import level
from lmcache_sglang.testing.conformance import adapter

CLAIMS = adapter.capabilities


@pytest.mark.slow
class TestSGLang(EngineTests):
    adapter = "lmcache_sglang.testing.conformance:adapter"
    capabilities = msgspec.structs.replace(CLAIMS, models=("llama",))


@pytest.mark.slow
class TestSGLangLatent(EngineBase):
    """DeepSeek-V2: one plane, one head, one writer. `lmcache conformance --adapter sglang` runs the whole suite."""

    adapter = "lmcache_sglang.testing.conformance:adapter"
    capabilities = msgspec.structs.replace(CLAIMS, models=("deepseek",), dtypes=("float32",))
    test_dialogue = ValueTests.test_logits_after_a_hit_are_those_of_recomputation_in_the_same_split
    test_restart = ValueTests.test_a_new_process_goes_on_from_disk_alone
    _goes_on = ValueTests._goes_on
    test_last = ValueTests.test_the_last_prompt_token_is_always_computed

    @level(Level.LOGITS)
    def test_a_prompt_that_ends_with_a_page_is_played_back_with_the_page_it_computed(self, bench: Bench) -> None:
        """That page is computed twice, in different splits; SGLang decodes from whichever is in its tree."""
        engine = bench.shared()
        for chunks in range(2, 10):
            prompt = bench.chunks(chunks, more=0)
            engine.ask(prompt, max_new_tokens=8)
            response = engine.ask(prompt, max_new_tokens=8)
            assert response.hit == len(prompt) - bench.chunk_tokens
            same_answer(response, engine.recompute(prompt, max_new_tokens=8), f"{chunks} whole pages")


@pytest.mark.slow
class TestSGLangSliding(EngineBase):
    """Mellum: sliding layers have their own pool, of which only a prompt's last pages are stored, and needed for a hit. So a
    prefix shared by two prompts only hits if one of them ended there, and the adapter does not claim the whole suite.
    """

    adapter = "lmcache_sglang.testing.conformance:adapter"
    capabilities = msgspec.structs.replace(CLAIMS, models=("mellum",), dtypes=("float32",))
    test_dialogue = ValueTests.test_logits_after_a_hit_are_those_of_recomputation_in_the_same_split
    test_restart = ValueTests.test_a_new_process_goes_on_from_disk_alone
    _goes_on = ValueTests._goes_on
    test_again = ValueTests.test_asking_again_and_again_changes_nothing
    test_damage = FaultTests.test_files_damaged_between_two_processes_are_misses

"""The SGLang adapter passes the engine suite: all of it with a Llama, what differs with latent attention."""

import msgspec
import pytest

from lmcache_conformance.engines import EngineTests
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.values import ValueTests
from lmcache_sglang.conformance import adapter

CLAIMS = adapter.capabilities


@pytest.mark.slow
class TestSGLang(EngineTests):
    adapter = "lmcache_sglang.conformance:adapter"
    capabilities = msgspec.structs.replace(CLAIMS, models=("llama",))


@pytest.mark.slow
class TestSGLangLatent(EngineBase):
    """DeepSeek-V2: one plane, one head, one writer. The rest is `lmcache conformance --adapter sglang`."""

    adapter = "lmcache_sglang.conformance:adapter"
    capabilities = msgspec.structs.replace(CLAIMS, models=("deepseek",), dtypes=("float32",))
    test_dialogue = ValueTests.test_logits_after_a_hit_are_those_of_recomputation_in_the_same_split
    test_restart = ValueTests.test_a_new_process_goes_on_from_disk_alone
    _goes_on = ValueTests._goes_on
    test_last = ValueTests.test_the_last_prompt_token_is_always_computed

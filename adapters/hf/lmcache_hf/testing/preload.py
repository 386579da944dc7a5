"""Imports everything that a session needs, once, before many sessions fork. See `conformance`."""

import transformers.generation.utils
import transformers.models.deepseek_v2.modeling_deepseek_v2
import transformers.models.gemma3.modeling_gemma3
import transformers.models.llama.modeling_llama  # noqa: F401

import lmcache.tiers.disk  # noqa: F401
import lmcache_hf.testing.session  # noqa: F401

"""Engine-agnostic KV cache for LLM engines: a hit is bit-for-bit what was computed, or it is a miss."""

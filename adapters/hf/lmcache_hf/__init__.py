"""KV cache for Hugging Face `generate`."""

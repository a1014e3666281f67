"""Make a Llama model of random bf16 weights with a word-level tokenizer: ``make_model.py DIRECTORY 1b|7b``.

The same every time (seeded), so checkpoints of two machines can be compared.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

# hidden, layers, intermediate, heads, key-value heads, vocabulary
SIZES = {"1b": (2048, 16, 8192, 32, 8, 32000), "7b": (4096, 32, 14336, 32, 8, 32000)}


def main(directory: Path, size: str) -> None:
    """Write config, weights and tokenizer."""
    import torch

    save_file = importlib.import_module("safetensors.torch").save_file

    directory.mkdir(parents=True, exist_ok=True)
    hidden, layers, intermediate, heads, kv_heads, vocabulary = SIZES[size]
    width = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(7)

    def matrix(rows: int, columns: int) -> Any:  # noqa: ANN401 - a tensor
        return (torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * (1.3 / columns**0.5)).cpu()

    def ones() -> Any:  # noqa: ANN401 - a tensor
        return torch.ones(hidden, dtype=torch.bfloat16)

    places: dict[str, str] = {}

    def shard(tensors: dict[str, Any]) -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(tensors, str(directory / name), metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    embeddings = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "lm_head.weight": matrix(vocabulary, hidden)}
    shard({**embeddings, "model.norm.weight": ones()})
    shapes = {
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (kv_heads * width, hidden),
        "self_attn.v_proj": (kv_heads * width, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norms = {f"{prefix}{name}.weight": ones() for name in ("input_layernorm", "post_attention_layernorm")}
        shard({**norms, **{f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_tokenizer(directory, vocabulary)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Words w3, w4, ...: enough for prompts given as token ids."""
    tokenizers = importlib.import_module("tokenizers")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    start = time.perf_counter()
    main(Path(sys.argv[1]), sys.argv[2])
    print(f"{sys.argv[2]} model in {time.perf_counter() - start:.1f} s", flush=True)

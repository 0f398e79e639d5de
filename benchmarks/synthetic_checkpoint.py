"""Write a checkpoint of random weights in the Llama layout, to measure memory and reads with.

    python benchmarks/synthetic_checkpoint.py DIR [--hidden 2048 --intermediate 8192 --layers 24]

The default is 2.9 GB in bfloat16. Its tokenizer knows bytes; what it says means nothing.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx

VOCAB_SIZE = 264


def make_config(hidden: int, intermediate: int, layers: int) -> dict[str, object]:
    """Return config.json of a Llama with 64-wide heads and four query heads a key head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_checkpoint(folder: Path, hidden: int, intermediate: int, layers: int) -> int:
    """Write the checkpoint, a file a layer, and return the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(hidden, intermediate, layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    keys = iter(list(mx.random.split(mx.random.key(0), 16 * layers)))
    weight_map: dict[str, str] = {}
    total_bytes = 0

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total_bytes
        arrays = {
            path: mx.ones(shape, mx.bfloat16)
            if len(shape) == 1
            else (0.02 * mx.random.normal(shape, key=next(keys))).astype(mx.bfloat16)
            for path, shape in shapes.items()
        }
        mx.save_safetensors(str(folder / name), arrays, {"format": "mlx"})
        weight_map.update(dict.fromkeys(arrays, name))
        total_bytes += sum(array.nbytes for array in arrays.values())

    total = layers + 1
    save(
        f"model-00001-of-{total:05d}.safetensors",
        {"model.embed_tokens.weight": (VOCAB_SIZE, hidden), "model.norm.weight": (hidden,)},
    )
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        save(
            f"model-{layer + 2:05d}-of-{total:05d}.safetensors",
            {
                f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
                f"{prefix}.self_attn.k_proj.weight": (hidden // 4, hidden),
                f"{prefix}.self_attn.v_proj.weight": (hidden // 4, hidden),
                f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
                f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
                f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
                f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
                f"{prefix}.input_layernorm.weight": (hidden,),
                f"{prefix}.post_attention_layernorm.weight": (hidden,),
            },
        )
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total_bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    size = write_checkpoint(options.folder, options.hidden, options.intermediate, options.layers)
    print(f"{options.folder}: {size / 1e9:.2f} GB of weights")

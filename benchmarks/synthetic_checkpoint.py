"""Write a checkpoint of random weights, to measure memory and reads with.

    python benchmarks/synthetic_checkpoint.py DIR [--shape NAME --layers N --bits 16]

The default is a Llama of 2.9 GB in bfloat16; shapes are those of ``ifp bench``. Its tokenizer knows
bytes; what it says means nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.benchmarking.shapes import QUANTIZATION_GROUP_SIZE, find_shape
from ifp_mlx.convert.checkpoint_writer import write_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_TOKENS = {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2}


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


def write_checkpoint(
    folder: Path, config: dict[str, Any], bits: int = 16, dtype: mx.Dtype = mx.bfloat16
) -> int:
    """Write a checkpoint, array by array, and return the bytes of its weights.

    Args:
        folder: is made.
        config: as in config.json; its vocabulary is replaced by one of bytes.
        bits: of quantized matrices; 16 quantizes none.
        dtype: of what is not quantized.
    """
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True, exist_ok=True)
    content = {**config, **_TOKENS}
    model_class, args_class = _get_classes(content)
    model: nn.Module = model_class(args_class.from_dict(content))  # lazy
    model.set_dtype(dtype)
    if bits != 16:
        nn.quantize(model, group_size=QUANTIZATION_GROUP_SIZE, bits=bits)
        content["quantization"] = {"group_size": QUANTIZATION_GROUP_SIZE, "bits": bits}
    write_tokenizer(folder)
    return write_model(model, content, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", help="in place of the Llama")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=int, default=16)
    options = parser.parse_args()
    wanted = LLAMA if options.shape is None else find_shape(options.shape).config
    if options.layers:
        wanted = {**wanted, "num_hidden_layers": options.layers}
    size = write_checkpoint(options.folder, wanted, options.bits)
    print(f"{options.folder}: {size / 1e9:.2f} GB of weights")

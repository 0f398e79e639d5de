"""Check that an exported sub-network answers alike here, in mlx-lm and in transformers.

    python benchmarks/export_parity.py export MODEL FOLDER
    python benchmarks/export_parity.py check FOLDER

``export`` writes a sub-network with ``ifp export`` as ``FOLDER/plain`` (with ``--dequantize``, for
transformers), ``FOLDER/4-bits`` and ``FOLDER/model.gguf``, and what ``ifp`` answers with the first
two greedily, token by token, as ``FOLDER/expected.json``. ``check`` needs mlx-lm, transformers,
torch and gguf, and refuses to run where ifp_mlx is installed. It compares tokens, and the shapes in
the GGUF file. Status 1 if anything differs; ends with one JSON line.
"""

import argparse
import functools
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

TASK = "help me write Python"
NEW_TOKENS = 64
PROMPTS = (
    "Explain step by step how a binary search works in Python, with code and comments.",
    "Write a long story about a dog who sails around the world.",
    "List ten facts about the planet Mars.",
    "Explain the difference between a list, a tuple and a dictionary in Python, with examples.",
    "Write a letter to a friend about a journey through Italy.",
    "Write a detailed essay about the history of the printing press.",
    "Write a haiku about the sea.",  # a short answer
)


def export(model: str, folder: Path) -> dict[str, Any]:
    """Write the sub-network in its forms and return what is expected of them."""
    from ifp_mlx.blas import prefer_openblas

    prefer_openblas()  # before mlx is imported

    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.storage.tokenizer import load_tokenizer
    from ifp_mlx.storage.weights import load_model

    command = [str(Path(sys.executable).with_name("ifp")), "export", "--model", model]
    command += ["--task", TASK, "--force", "-o"]
    plain, packed = folder / "plain", folder / "4-bits"
    subprocess.run([*command, plain, "--dequantize", "--gguf", folder / "model.gguf"], check=True)
    subprocess.run([*command, packed, "--quantize", "4", "--group-size", "32"], check=True)
    expected: dict[str, Any] = {}
    for path in (plain, packed):
        model_of, config = load_model(path)
        converse = functools.partial(
            Conversation, model_of, load_tokenizer(path), int(config["max_position_embeddings"])
        )
        expected[path.name] = answers(converse)
        expected |= {
            "num_kept_units": config["intermediate_size"],
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
        }
    return expected


def answers(converse: Callable[[], Any]) -> list[list[int]]:
    """Return the first tokens of a fresh conversation's reply to each prompt."""
    from ifp_mlx.chat.sampling import SamplingOptions

    tokens = []
    for prompt in PROMPTS:
        conversation = converse()
        message = [{"role": "user", "content": prompt}]
        for _ in conversation.reply(message, SamplingOptions(max_new_tokens=NEW_TOKENS + 1)):
            pass
        start = conversation.stats.prompt_tokens
        tokens.append(conversation.kv_cache.token_ids[start : start + NEW_TOKENS])
    return tokens


def mlx_lm_answers(folder: Path) -> list[list[int]]:
    """Return mlx-lm's tokens for each prompt."""
    import mlx_lm

    loaded: Any = mlx_lm.load(str(folder))
    model, tokenizer = loaded
    tokens = []
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        replies = mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=NEW_TOKENS)
        tokens.append([reply.token for reply in replies])
    return tokens


def transformers_answers(folder: Path) -> list[list[int]]:
    """Return transformers' tokens for each prompt, in float32."""
    import torch
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = []
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        reply = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens.append(reply[0, inputs["input_ids"].shape[1] :].tolist())
    return tokens


def gguf_fits(file: Path, expected: dict[str, Any]) -> bool:
    """Return whether a GGUF file says K and has FFN matrices of that width."""
    import gguf

    reader = gguf.GGUFReader(file)
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    kept, hidden = expected["num_kept_units"], expected["hidden_size"]
    width = reader.get_field("llama.feed_forward_length")
    fits = width is not None and bool(width.contents() == kept)
    for layer in range(expected["num_layers"]):  # GGUF names the fastest axis first
        fits &= shapes[f"blk.{layer}.ffn_gate.weight"] == [hidden, kept]
        fits &= shapes[f"blk.{layer}.ffn_up.weight"] == [hidden, kept]
        fits &= shapes[f"blk.{layer}.ffn_down.weight"] == [kept, hidden]
    return fits


def check(folder: Path) -> dict[str, Any]:
    """Return how many answers are the same, for each form and program."""
    if importlib.util.find_spec("ifp_mlx") is not None:
        raise SystemExit("ifp_mlx is installed here; run this where it is not")
    expected = json.loads((folder / "expected.json").read_text())
    programs = {
        "plain, mlx-lm": ("plain", mlx_lm_answers),
        "plain, transformers": ("plain", transformers_answers),
        "4-bits, mlx-lm": ("4-bits", mlx_lm_answers),
    }
    names = ("mlx", "mlx-lm", "transformers", "torch", "gguf")
    same: dict[str, Any] = {}
    for name, (form, answer) in programs.items():
        pairs = zip(answer(folder / form), expected[form], strict=True)
        # Ours leave out the token that ends a reply.
        equal = [found[: len(own)] == own and len(found) - len(own) <= 1 for found, own in pairs]
        same[name] = equal
        lengths = [len(tokens) for tokens in expected[form]]
        print(f"{name}: {sum(equal)} of {len(equal)} answers equal, tokens {lengths}", flush=True)
    same["gguf"] = gguf_fits(folder / "model.gguf", expected)
    print(f"gguf: shapes {'fit' if same['gguf'] else 'differ'}")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: metadata.version(name) for name in names},
        "tokens": {form: [len(own) for own in expected[form]] for form in ("plain", "4-bits")},
        "same": same,
    }


def main() -> None:
    """Parse, export or check, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("model")
    exporting.add_argument("folder", type=Path)
    commands.add_parser("check").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "export":
        options.folder.mkdir(parents=True, exist_ok=True)
        expected = export(options.model, options.folder)
        (options.folder / "expected.json").write_text(json.dumps(expected))
        print(f"K = {expected['num_kept_units']}")
        return
    found = check(options.folder)
    print(json.dumps(found))
    same = found["same"].values()
    if not all(all(value) if isinstance(value, list) else value for value in same):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

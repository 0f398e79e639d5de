"""What a reader of a page has: a clone, a home with models in it, and the files that pages name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from documented_commands import ROOT

from ifp_mlx.convert.gguf_export import export_gguf

sys.path.insert(0, str(ROOT / "benchmarks"))
from synthetic_checkpoint import write_checkpoint

DEFAULT_MODEL = "smollm2-135m"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
_TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 1536,  # as the default model has: the pages say --keep-units 512
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_TINY_MIXTURE = _TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# What the examples of the pages ask for; short, because every one of them is answered.
_REQUESTS = [
    "Select all names from the table people.",
    "How many orders are there for each customer?",
    "Delete all rows that are older than a year.",
    "What is the average price of a book?",
]
_ANSWERED = [{"prompt": text, "response": f"SELECT {len(text)};"} for text in _REQUESTS]
_WITH_ANSWERS = [{"prompt": text, "answer": f"SELECT {len(text)};"} for text in _REQUESTS]
_CHOICES = [{"prompt": "Which is a fruit?", "choices": ["a stone", "an apple"], "answer": 1}]
_NUMBERS = [{"prompt": "What is 2 + 2?", "answer": 4}]
_FUNCTIONS = [
    {
        "task_id": f"add/{number}",
        "prompt": f'def add_{number}(x):\n    """Add {number} to x."""\n',
        "entry_point": f"add_{number}",
        "test": f"assert add_{number}(1) == {number + 1}\n",
    }
    for number in range(12)
]
_RUN = f"""model = "{DEFAULT_MODEL}"
mask = "static"
[[stages]]
tokens = 2000
[data]
instructions = ["mine.jsonl"]
"""


def _json_lines(records: list[Any]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


TEXTS = {
    "requests.jsonl": _json_lines(_WITH_ANSWERS),
    "sql20.jsonl": _json_lines(_WITH_ANSWERS),
    "swift.jsonl": _json_lines(_WITH_ANSWERS),
    "requests.txt": "\n".join(_REQUESTS),
    "questions.txt": "\n".join(_REQUESTS[:2]),
    "questions.jsonl": _json_lines(_WITH_ANSWERS[:2]),
    "contract.txt": "The tenant pays the rent. The contract ends in May.",
    "mine.jsonl": _json_lines(_ANSWERED * 6),
    "run.toml": _RUN,
    "quiz.jsonl": _json_lines(_CHOICES),
    "sums.jsonl": _json_lines(_NUMBERS),
    "DATA/function/mbpp.jsonl": _json_lines(_FUNCTIONS),
    "FOLDER/sql.jsonl": _json_lines(_ANSWERED[:2]),
    "FOLDER/coding.jsonl": _json_lines(_ANSWERED[2:4]),
}
"""Files that the pages take for granted, and what is in them."""

_MODELS = {
    "MODEL": _TINY,
    "ORG/NAME": _TINY,
    "path/to/checkpoint": _TINY,
}
_PULLED = {
    "qwen2.5-coder-0.5b": (_TINY, 16),
    "qwen3-30b-a3b-instruct-2507-4bit": (_TINY_MIXTURE, 4),
}
"""Models that the pages take for granted, and what stands for them; the latter in the home."""

_RESULTS = {
    "mixture.json": ROOT / "benchmarks" / "results" / "mixture" / "mixture.json",
    "oracle.json": ROOT / "benchmarks" / "results" / "variants" / "oracle.json",
    "runs/ifp-joint/adapter": ROOT / "ifp_mlx" / "data" / DEFAULT_MODEL / "adapter",
}
"""What the runs of an accelerator left: in the repository it has another place."""


def write_tiny_model(folder: Path, config: dict[str, Any] | None = None, bits: int = 16) -> None:
    """Write a checkpoint of random weights whose tokens are bytes, with a chat template.

    Args:
        folder: is made.
        config: as in config.json; None is a llama with as many units as the default model has.
        bits: 4 as well.
    """
    write_checkpoint(folder, config or _TINY, bits, mx.float32)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["th"] = len(vocabulary)  # GGUF knows no byte-level tokenizer without merges
    tokenizer["model"]["merges"] = [["t", "h"]]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": _CHAT_TEMPLATE}
    path.write_text(json.dumps(settings), encoding="utf-8")


def clone(folder: Path) -> None:
    """Copy what git knows of this repository, as it is now, into a repository of its own.

    One line of it is changed after the commit, so that there is a difference to look at.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=reader", "-c", "user.email=reader@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "A clone"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    with (folder / "CHANGELOG.md").open("a", encoding="utf-8") as file:
        file.write("\nA line more.\n")


def add_files(folder: Path) -> None:
    """Write the files and models that pages take for granted into a folder."""
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copytree(folder / "FOLDER", folder / "eval")
    for name, path in _RESULTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    for name, config in _MODELS.items():
        write_tiny_model(folder / name, config)
    export_gguf(folder / "MODEL", folder / "model.gguf")


def add_models(home: Path, default_model: Path | None) -> None:
    """Put models where ``ifp pull`` would.

    Args:
        home: what ``IFP_HOME`` names.
        default_model: a checkpoint that is copied there; None leaves it to the page to get it.
    """
    for name, (config, bits) in _PULLED.items():
        write_tiny_model(home / "models" / name, config, bits)
    if default_model is not None:
        shutil.copytree(default_model, home / "models" / DEFAULT_MODEL)

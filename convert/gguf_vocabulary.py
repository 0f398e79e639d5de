"""A checkpoint's byte-level tokenizer in the terms of GGUF metadata."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from ifp_mlx.convert.gguf_tokenizer import PRE_TOKENIZERS
from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What GGUF wants to know about a byte-level BPE tokenizer.

    Attributes:
        tokens: by id.
        types: ``gguf.TokenType`` of each token.
        merges: two tokens separated by a space, best first.
        pre_tokenizer: the name under which llama.cpp knows how text is cut before merging.
        adds_bos: texts begin with the beginning token.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    adds_bos: bool
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None


def read_vocabulary(checkpoint: Path) -> Vocabulary:
    """Return the vocabulary of a checkpoint's tokenizer.json.

    Raises:
        CheckpointError: there is none, or it is not byte-level BPE with a known pre-tokenizer.
    """
    path = checkpoint / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(path))
        model = content["model"]
    except Exception as error:  # what tokenizers raises has no type of its own
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"{path} is not a byte-level BPE tokenizer, which GGUF export needs")
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    names = {index: token for token, index in tokenizer.get_vocab(True).items()}
    size = max(names, default=-1) + 1
    tokens = [names.get(index, f"[UNUSED{index}]") for index in range(size)]
    types = [
        gguf.TokenType.UNUSED
        if index not in names
        else gguf.TokenType.NORMAL
        if index not in added
        else gguf.TokenType.CONTROL
        if added[index]["special"]
        else gguf.TokenType.USER_DEFINED
        for index in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    wrapped = load_tokenizer(checkpoint)
    begins = wrapped.encode("a")
    return Vocabulary(
        tokens=tokens,
        types=[int(kind) for kind in types],
        merges=merges,
        pre_tokenizer=_pre_tokenizer_name(path, content.get("pre_tokenizer")),
        adds_bos=wrapped.bos_token_id is not None and begins[0] == wrapped.bos_token_id,
        bos_id=wrapped.bos_token_id,
        eos_id=wrapped.eos_token_id,
        pad_id=wrapped.pad_token_id,
        chat_template=wrapped.chat_template if isinstance(wrapped.chat_template, str) else None,
    )


def _pre_tokenizer_name(path: Path, description: Any) -> str:
    wanted = _essence(description)
    for name, make in PRE_TOKENIZERS.items():
        probe = Tokenizer.from_str(
            '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'
        )
        probe.pre_tokenizer = make()
        if _essence(json.loads(probe.to_str())["pre_tokenizer"]) == wanted:
            return name
    raise CheckpointError(
        f"{path} has a pre-tokenizer that llama.cpp has no name for among: "
        f"{', '.join(PRE_TOKENIZERS)}"
    )


def _essence(description: Any) -> Any:
    """Return a pre-tokenizer's description without what does not change its pieces."""
    if isinstance(description, list):
        return [_essence(part) for part in description]
    if isinstance(description, dict):
        parts = description.get("pretokenizers")
        if parts is not None and len(parts) == 1:
            return _essence(parts[0])
        return {k: _essence(v) for k, v in description.items() if k != "trim_offsets"}
    return description

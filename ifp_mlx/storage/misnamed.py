"""What a file really is that has the name of a model and not its content."""

import re
from pathlib import Path

_OLLAMA = re.compile(r"sha256-[0-9a-f]{64}")
_POINTER = "is a Git LFS pointer, not the file itself; run git lfs pull there, or download the file"
_PAGE = "is a web page, not the file itself; download the file, not the page about it"
_BEGINNINGS = {
    b"version https://git-lfs": _POINTER,
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"GGUF": "is a GGUF file; give it to ifp convert",
    b"PK\x03\x04": "is a zip archive; unpack it, and use safetensors or GGUF files of it",
    **dict.fromkeys(
        (b"lmgg", b"fmgg", b"tjgg", b"algg"),
        "has a format of llama.cpp from before GGUF; get a GGUF file of this model",
    ),
}


def what_it_is(path: Path, beginning: bytes) -> str | None:
    """Return what to say of a file that is not what was expected, None if nothing is known.

    Args:
        path: the file, whose name may tell.
        beginning: its first bytes, at least 32 of them if there are so many.
    """
    if not beginning:
        return "is empty; download it again"
    for known, what in _BEGINNINGS.items():
        if beginning[: len(known)].lower() == known.lower():
            return what
    if _OLLAMA.fullmatch(path.name):
        return (
            "is a blob of Ollama's, but not the one with the model; the line FROM of "
            "ollama show --modelfile NAME says which that is"
        )
    return None

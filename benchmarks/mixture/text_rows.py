"""Training text as rows of token ids: documents back to back, instructions packed whole.

    python text_rows.py DATA_FOLDER TOKENIZER_JSON ROWS.npz

Reads ``pretrain/*.jsonl.xz`` and ``sft/*.jsonl.xz`` below the data folder, never ``eval/``.
Files named ``*_noncommercial`` are left out. Needs numpy and tokenizers, nothing else.
"""

import argparse
import dataclasses
import json
import lzma
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

ROW_TOKENS = 1024
END_OF_TEXT = 0  # <|endoftext|>, between documents
END_OF_TURN = 2  # <|im_end|>, the end of an answer
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_BATCH = 2048


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of training text.

    Attributes:
        tokens: (N, 1024) uint16.
        is_target: (N, 1024) bool, tokens that the loss predicts.
        domains: (N,) int16 into ``names``; of an instruction row the domain of most tokens.
        is_document: (N,) bool.
        names: domains; those of documents begin with ``lm_``, as the evaluation names them.
    """

    tokens: npt.NDArray[np.uint16]
    is_target: npt.NDArray[np.bool_]
    domains: npt.NDArray[np.int16]
    is_document: npt.NDArray[np.bool_]
    names: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write the arrays to an .npz file."""
        np.savez(
            path,
            tokens=self.tokens,
            is_target=np.packbits(self.is_target, axis=1),
            domains=self.domains,
            is_document=self.is_document,
            names=np.array(self.names),
        )

    @classmethod
    def load(cls, path: Path) -> "Rows":
        """Return the rows of an .npz file."""
        with np.load(path) as arrays:
            return cls(
                tokens=arrays["tokens"],
                is_target=np.unpackbits(arrays["is_target"], axis=1).astype(np.bool_),
                domains=arrays["domains"],
                is_document=arrays["is_document"],
                names=tuple(str(name) for name in arrays["names"]),
            )


def chat_prompt(prompt: str) -> str:
    """Return a user's message in SmolLM2's chat template, up to where the answer begins."""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl or .jsonl.xz file."""
    raw = path.read_bytes()
    text = lzma.decompress(raw) if path.suffix == ".xz" else raw
    return [json.loads(line) for line in text.decode().splitlines() if line.strip()]


def build_rows(
    data: Path,
    tokenizer: Tokenizer,
    *,
    skip_sources: tuple[str, ...] = (),
    limit: int = 0,
    mixed: bool = True,
) -> Rows:
    """Return all training text as rows, instruction rows first.

    Args:
        data: holds ``pretrain`` and ``sft``.
        tokenizer: of the model.
        skip_sources: records whose source begins with one of these are left out.
        limit: records a file, for tests; 0 reads all.
        mixed: whether an instruction row may hold examples of several domains.
    """
    paths = [
        path
        for folder in ("sft", "pretrain")
        for path in sorted((data / folder).glob("*.jsonl.xz"))
        if "noncommercial" not in path.name
    ]
    with ThreadPoolExecutor(8) as pool:  # lzma lets go of the interpreter
        files = list(pool.map(read_records, paths))
    names: list[str] = []
    answers: list[_Piece] = []
    parts: list[tuple[Any, ...]] = []
    for path, records in zip(paths, files, strict=True):
        is_document = path.parent.name == "pretrain"
        names.append(("lm_" if is_document else "") + path.name.partition(".")[0])
        used = [
            record
            for record in records
            if not str(record.get("source", "")).startswith(skip_sources or ("\0",))
        ][: limit or None]
        random.Random(len(names)).shuffle(used)
        if is_document:
            rows = _document_rows([record["text"] for record in used], tokenizer)
            parts.append(
                (rows, np.arange(ROW_TOKENS)[None] > np.zeros((len(rows), 1)), len(names) - 1)
            )
        else:
            answers += _instructions(used, tokenizer, len(names) - 1)
    random.Random(0).shuffle(answers)
    domain_answers = [[one for one in answers if one[2] == index] for index in range(len(names))]
    packed = [_packed(pieces) for pieces in ([answers] if mixed else domain_answers)]
    tokens, targets, domains = (np.concatenate(part) for part in zip(*packed, strict=True))
    return Rows(
        tokens=np.concatenate([tokens, *(part[0] for part in parts)]),
        is_target=np.concatenate([targets, *(part[1] for part in parts)]),
        domains=np.concatenate(
            [domains, *(np.full(len(part[0]), part[2], np.int16) for part in parts)]
        ),
        is_document=np.concatenate(
            [np.zeros(len(tokens), np.bool_), *(np.ones(len(part[0]), np.bool_) for part in parts)]
        ),
        names=tuple(names),
    )


_Piece = tuple[list[int], int, int]  # ids, number of prompt tokens, domain


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids


def _instructions(records: list[dict[str, Any]], tokenizer: Tokenizer, domain: int) -> list[_Piece]:
    prompts = _encode(tokenizer, [chat_prompt(record["prompt"]) for record in records])
    answers = _encode(tokenizer, [record["response"] for record in records])
    pieces: list[_Piece] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompt) + len(answer) < ROW_TOKENS:
            pieces.append(([*prompt, *answer, END_OF_TURN], len(prompt), domain))
    return pieces


def _document_rows(texts: list[str], tokenizer: Tokenizer) -> npt.NDArray[np.uint16]:
    stream: list[npt.NDArray[np.uint16]] = []
    for ids in _encode(tokenizer, texts):
        stream.append(np.array([*ids, END_OF_TEXT], np.uint16))
    tokens = np.concatenate(stream) if stream else np.zeros(0, np.uint16)
    return tokens[: len(tokens) // ROW_TOKENS * ROW_TOKENS].reshape(-1, ROW_TOKENS)


def _packed(
    pieces: list[_Piece], num_open: int = 16
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_], npt.NDArray[np.int16]]:
    """Return rows of whole examples; each goes into the fullest open row that has room."""
    closed: list[list[_Piece]] = []
    rows: list[tuple[int, list[_Piece]]] = []
    for piece in pieces:
        size = len(piece[0])
        fits = [row for row in rows if row[0] + size <= ROW_TOKENS]
        best = max(fits, key=lambda row: row[0]) if fits else (0, [])
        if fits:
            rows.remove(best)
        rows.append((best[0] + size, [*best[1], piece]))
        if len(rows) > num_open:
            fullest = max(rows, key=lambda row: row[0])
            rows.remove(fullest)
            closed.append(fullest[1])
    closed += [row[1] for row in rows]
    tokens = np.full((len(closed), ROW_TOKENS), END_OF_TEXT, np.uint16)
    targets = np.zeros((len(closed), ROW_TOKENS), np.bool_)
    domains = np.zeros(len(closed), np.int16)
    for index, row in enumerate(closed):
        start = 0
        sizes: dict[int, int] = {}
        for ids, num_prompt, domain in row:
            tokens[index, start : start + len(ids)] = ids
            targets[index, start + num_prompt : start + len(ids)] = True
            sizes[domain] = sizes.get(domain, 0) + len(ids)
            start += len(ids)
        domains[index] = max(sizes, key=lambda key: sizes[key])
    return tokens, targets, domains


def main() -> None:
    """Tokenise what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("rows", type=Path, help="the .npz to write")
    parser.add_argument("--skip-source", action="append", default=[], help="such as t0:")
    parser.add_argument("--limit", type=int, default=0, help="records a file, for tests")
    arguments = parser.parse_args()
    start = time.perf_counter()
    rows = build_rows(
        arguments.data,
        Tokenizer.from_file(str(arguments.tokenizer)),
        skip_sources=tuple(arguments.skip_source),
        limit=arguments.limit,
    )
    rows.save(arguments.rows)
    documents = int(rows.is_document.sum())
    print(
        f"{documents} rows of documents, {len(rows.tokens) - documents} of instructions "
        f"({rows.is_target[~rows.is_document].mean():.3f} scored), "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

"""Tokenised training examples: flat arrays on disk, memory-mapped when they are read."""

import array
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.errors import DataError
from ifp_mlx.storage.files import staged_directory
from ifp_mlx.text.hub_records import HubSource
from ifp_mlx.text.records import (
    BadLines,
    check_document,
    check_prompt_response,
    messages_of,
    read_records,
)

_ARRAYS = ("tokens", "is_target", "spans", "sources", "domains")


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Many tokenised examples in flat arrays.

    Attributes:
        tokens: (N,) unsigned, all token ids in a row.
        is_target: (N,) bool, tokens that the loss predicts.
        spans: (E, 2) int64, an example's tokens.
        sources: (E, 2) int64, the tokens that the predictor reads for it.
        domains: (E,) int16, index into ``domain_names``.
        domain_names: one name a file.
        document_domains: the names of those that hold documents.
    """

    tokens: npt.NDArray[Any]
    is_target: npt.NDArray[np.bool_]
    spans: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int16]
    domain_names: tuple[str, ...]
    document_domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return E."""
        return len(self.spans)

    def example(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return the tokens of an example and which of them are targets."""
        start, end = self.spans[index]
        return self.tokens[start:end], self.is_target[start:end]

    def source(self, index: int) -> npt.NDArray[Any]:
        """Return the tokens that the predictor reads for an example."""
        start, end = self.sources[index]
        return self.tokens[start:end]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the (E,) numbers of tokens."""
        lengths: npt.NDArray[np.int64] = self.spans[:, 1] - self.spans[:, 0]
        return lengths

    def subset(self, indices: npt.NDArray[np.int64]) -> "ExampleSet":
        """Return some of the examples, in the given order; the tokens are shared."""
        return dataclasses.replace(
            self,
            spans=self.spans[indices],
            sources=self.sources[indices],
            domains=self.domains[indices],
        )

    def save(self, folder: Path) -> None:
        """Write the arrays to a folder, whole or not at all."""
        with staged_directory(folder, overwrite=True) as staging:
            for name in _ARRAYS:
                np.save(staging / f"{name}.npy", getattr(self, name))
            names = {"domains": self.domain_names, "documents": self.document_domains}
            (staging / "domains.json").write_text(json.dumps(names))

    @classmethod
    def load(cls, folder: Path) -> "ExampleSet":
        """Return the examples of a folder, memory-mapped.

        Raises:
            DataError: the folder is missing or damaged.
        """
        try:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
            names = json.loads((folder / "domains.json").read_text())
            return cls(
                **arrays,
                domain_names=tuple(names["domains"]),
                document_domains=tuple(names["documents"]),
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} is no folder of tokenised examples: {error}") from error


@dataclasses.dataclass(frozen=True)
class ExampleRules:
    """How text becomes examples.

    Attributes:
        max_tokens: an example is cut here; one whose targets all lie behind it is dropped.
        chunk_tokens: length of a document's chunks.
        num_chunks: C; chunk c selects for chunk c + 1 behind the whole prefix.
        document_stride: every n-th document of a file is used.
        excluded_sources: records whose ``source`` starts with one of these are left out.
    """

    max_tokens: int = 512
    chunk_tokens: int = 256
    num_chunks: int = 2
    document_stride: int = 1
    excluded_sources: tuple[str, ...] = ()

    def excludes(self, record: dict[str, Any]) -> bool:
        """Tell whether a record is to be left out because of where it comes from."""
        return str(record.get("source", "")).startswith(self.excluded_sources or ("\0",))


class _Builder:
    """Collects examples in growing flat arrays."""

    def __init__(self) -> None:
        self.tokens = array.array("I")
        self.is_target = bytearray()
        self.spans: list[tuple[int, int]] = []
        self.sources: list[tuple[int, int]] = []
        self.domains: list[int] = []

    def add(self, domain: int, ids: Sequence[int], target: Sequence[bool], source: Any) -> None:
        """Add one example; ``source`` is a (start, end) within it, or a list of other ids."""
        start = len(self.tokens)
        self._append(ids, target)
        self.spans.append((start, len(self.tokens)))
        if isinstance(source, tuple):
            self.sources.append((start + source[0], start + source[1]))
        else:
            begin = len(self.tokens)
            self._append(source, [False] * len(source))
            self.sources.append((begin, len(self.tokens)))
        self.domains.append(domain)

    def _append(self, ids: Sequence[int], target: Sequence[bool]) -> None:
        self.tokens.extend(ids)
        self.is_target.extend(bytes(bool(flag) for flag in target))

    def build(self, names: Sequence[str], documents: Sequence[str]) -> ExampleSet:
        tokens = np.frombuffer(self.tokens, dtype=np.uint32) if self.tokens else np.zeros(0, "u4")
        small = tokens.size == 0 or int(tokens.max()) < 2**16
        return ExampleSet(
            tokens=tokens.astype(np.uint16 if small else np.uint32),
            is_target=np.frombuffer(bytes(self.is_target), dtype=np.bool_),
            spans=np.array(self.spans, dtype=np.int64).reshape(-1, 2),
            sources=np.array(self.sources, dtype=np.int64).reshape(-1, 2),
            domains=np.array(self.domains, dtype=np.int16),
            domain_names=tuple(names),
            document_domains=tuple(documents),
        )


def tokenise_files(
    instruction_files: Sequence[Path],
    document_files: Sequence[Path],
    tokenizer: ChatTokenizer,
    rules: ExampleRules,
    bad: BadLines,
) -> ExampleSet:
    """Return the examples of JSON-lines files or hub data sets; a file's name is its domain.

    Raises:
        DataError: a file that cannot be used, a bad line, or nothing left after filtering.
    """
    builder = _Builder()
    names: list[str] = []
    for path in instruction_files:
        names.append(domain_of(path))
        for record in read_records(path, check_prompt_response, bad):
            if rules.excludes(record):
                bad.counts["excluded source"] += 1
                continue
            _add_instruction(builder, len(names) - 1, record, tokenizer, rules, bad)
    documents = [domain_of(path) for path in document_files]
    for path in document_files:
        names.append(domain_of(path))
        records = read_records(path, check_document, bad)
        for record in itertools.islice(records, 0, None, rules.document_stride):
            if rules.excludes(record):
                bad.counts["excluded source"] += 1
                continue
            _add_document(builder, len(names) - 1, record["text"], tokenizer, rules, bad)
    if not builder.spans:
        raise DataError("no training example is left after filtering; check `data` and the rules")
    return builder.build(names, documents)


def domain_of(path: Path) -> str:
    """Return a data file's domain, its name without .jsonl and .xz; of the hub, the data set's."""
    hub = HubSource.parse(path)
    if hub is not None:
        return hub.domain
    return path.name.removesuffix(".xz").removesuffix(".jsonl")


def _add_instruction(
    builder: _Builder,
    domain: int,
    record: dict[str, Any],
    tokenizer: ChatTokenizer,
    rules: ExampleRules,
    bad: BadLines,
) -> None:
    """Add a prompt and its response, or a conversation; the loss is on the responses."""
    messages = messages_of(record)
    ids: list[int] = []
    target: list[bool] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        context = chat_ids(tokenizer, messages[:index])
        if context[: len(ids)] != ids:
            # A template that rewrites earlier turns: only the last answer then has its context.
            ids, target = [], []
        answer = tokenizer.encode(message["content"], add_special_tokens=False)
        target += [False] * (len(context) - len(target)) + [True] * (len(answer) + 1)
        ids = [*context, *answer, tokenizer.eos_token_id]
    ids, target = ids[: rules.max_tokens], target[: rules.max_tokens]
    if not any(target):
        bad.counts["prompt leaves no room for an answer"] += 1
        return
    first = next(message for message in messages if message["role"] == "user")
    source = chat_ids(tokenizer, [first])
    inside = ids[: len(source)] == source
    builder.add(domain, ids, target, (0, len(source)) if inside else source)


def _add_document(
    builder: _Builder,
    domain: int,
    text: str,
    tokenizer: ChatTokenizer,
    rules: ExampleRules,
    bad: BadLines,
) -> None:
    """Add a document's windows: the mask from chunk c serves chunk c + 1 behind the prefix."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = list(document_spans(len(ids), rules))
    if not spans:
        bad.counts["document shorter than two chunks"] += 1
    for start, end in spans:
        window = ids[start:end]
        size = rules.chunk_tokens
        for chunk in range(1, len(window) // size):
            tokens = window[: (chunk + 1) * size]
            target = [False] * (chunk * size) + [True] * size
            builder.add(domain, tokens, target, ((chunk - 1) * size, chunk * size))


def document_spans(num_tokens: int, rules: ExampleRules) -> Iterator[tuple[int, int]]:
    """Yield the windows of C chunks in a document; a rest of at least two chunks is one too."""
    width = rules.chunk_tokens * rules.num_chunks
    for start in range(0, num_tokens, width):
        whole_chunks = (min(start + width, num_tokens) - start) // rules.chunk_tokens
        if whole_chunks >= 2:
            yield start, start + whole_chunks * rules.chunk_tokens

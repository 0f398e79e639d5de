"""Text of known domains: rows to train on, one domain a row, and held-out examples.

    PYTHONPATH=benchmarks/mixture python oracle_rows.py DATA_FOLDER TOKENIZER_JSON \
        ROWS.npz HELD_OUT.npz

Every domain gets as many rows, so far as it has text. Of the held-out files the first examples that
fit are read: an instruction is scored on its answer, a document on its first 1024 tokens.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from text_rows import END_OF_TURN, ROW_TOKENS, Rows, build_rows, chat_prompt, read_records
from tokenizers import Tokenizer


def training_rows(data: Path, tokenizer: Tokenizer, rows_a_domain: int, limit: int = 0) -> Rows:
    """Return at most ``rows_a_domain`` rows of each domain, sorted by domain."""
    rows = build_rows(data, tokenizer, limit=limit, mixed=False)
    kept = np.concatenate(
        [np.flatnonzero(rows.domains == d)[:rows_a_domain] for d in range(len(rows.names))]
    )
    return take_rows(rows, kept)


def take_rows(rows: Rows, kept: npt.NDArray[np.int64]) -> Rows:
    """Return some of the rows."""
    return Rows(
        rows.tokens[kept],
        rows.is_target[kept],
        rows.domains[kept],
        rows.is_document[kept],
        rows.names,
    )


def held_out_rows(data: Path, tokenizer: Tokenizer, examples: int) -> Rows:
    """Return the first examples of each file below ``eval`` that fit, one a row, padded with 0."""
    names, ids, num_context, domains = [], [], [], []
    for path in sorted((data / "eval").glob("*.jsonl")):
        names.append(path.stem)
        found = 0
        for record in read_records(path):
            if found == examples:
                break
            if path.stem.startswith("lm_"):
                prompt = 1  # nothing predicts the first token
                own = _ids(tokenizer, record["text"])[:ROW_TOKENS]
            else:
                context = _ids(tokenizer, chat_prompt(record["prompt"]))
                prompt = len(context)
                own = [*context, *_ids(tokenizer, record["response"]), END_OF_TURN]
            if prompt < len(own) <= ROW_TOKENS:
                found += 1
                ids.append(own)
                num_context.append(prompt)
                domains.append(len(names) - 1)
    tokens = np.zeros((len(ids), ROW_TOKENS), np.uint16)
    is_target = np.zeros(tokens.shape, np.bool_)
    for index, (own, prompt) in enumerate(zip(ids, num_context, strict=True)):
        tokens[index, : len(own)] = own
        is_target[index, prompt : len(own)] = True
    is_document = np.array([names[domain].startswith("lm_") for domain in domains])
    return Rows(tokens, is_target, np.array(domains, np.int16), is_document, tuple(names))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def main() -> None:
    """Tokenise what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="holds sft/, pretrain/ and eval/")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("rows", type=Path, help="the .npz to write: text to train on")
    parser.add_argument("held_out", type=Path, help="the .npz to write: held-out examples")
    parser.add_argument("--rows-a-domain", type=int, default=610, help="of 1024 tokens")
    parser.add_argument("--examples", type=int, default=40, help="held out, a domain")
    parser.add_argument("--limit", type=int, default=0, help="training records a file, for tests")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    training = training_rows(arguments.data, tokenizer, arguments.rows_a_domain, arguments.limit)
    held_out = held_out_rows(arguments.data, tokenizer, arguments.examples)
    training.save(arguments.rows)
    held_out.save(arguments.held_out)
    for kind, rows in (("training", training), ("held out", held_out)):
        for domain, name in enumerate(rows.names):
            own = rows.domains == domain
            print(f"{kind} {name}: {own.sum()} rows, {rows.is_target[own].sum()} tokens scored")


if __name__ == "__main__":
    main()

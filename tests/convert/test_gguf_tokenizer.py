"""Tokenizers from the metadata of GGUF files."""

import inspect
import json
import random
import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.convert.gguf_tokenizer import (
    PRE_TOKENIZERS,
    generation_config_of,
    tokenizer_of,
)


def byte_level_file(path: Path, pre: str, merges: list[str], **extra: Any) -> GGUFFile:
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, "llama")
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += ["".join(merge.split(" ")) for merge in merges] + ["<|end|>", "<tool>"]
    types = [1] * (len(tokens) - 2) + [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_bos_token_id(len(tokens) - 2)
    for key, value in extra.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


DIGITS = ["1 2", "12 3", "123 4"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("starcoder", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("gpt-4o", ["123", "4"]),
    ],
)
def test_pre_tokenizers_cut_numbers_as_their_models_do(
    tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    file = byte_level_file(tmp_path / "t.gguf", pre, DIGITS, add_bos_token=False)
    assert tokenizer_of(file).tokenize("1234") == pieces


@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "starcoder", "llama-bpe", "smaug-bpe", "gpt-4o"]
)
def test_byte_level_tokenizers_give_every_text_back(tmp_path: Path, pre: str) -> None:
    file = byte_level_file(tmp_path / "t.gguf", pre, DIGITS)
    tokenizer = tokenizer_of(file)
    rng = random.Random(3)
    alphabet = "ab 1\n\t\r'sT🙂éß漢ﬁ½٣\u00a0\u200b.,_<|end|>{}"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 24)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<|end|><tool>", add_special_tokens=False)[1:] == [259, 260]


def test_beginning_token_is_added_where_the_model_was_trained_so(tmp_path: Path) -> None:
    plain = byte_level_file(tmp_path / "a.gguf", "llama-bpe", DIGITS)
    assert tokenizer_of(plain).encode("a")[0] == 259
    off = byte_level_file(tmp_path / "b.gguf", "llama-bpe", DIGITS, add_bos_token=False)
    assert tokenizer_of(off).encode("a")[0] != 259
    other = byte_level_file(tmp_path / "c.gguf", "smollm", DIGITS)
    assert tokenizer_of(other).encode("a")[0] != 259


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_tokenizer_equals_sentencepiece(
    tmp_path: Path, add_space_prefix: bool
) -> None:
    import sentencepiece

    text = Path(__file__).read_text(encoding="utf-8").replace("\n", " ")
    (tmp_path / "text.txt").write_text("\n".join(text[i : i + 200] for i in range(0, 9000, 200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=420,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=add_space_prefix, minloglevel=2,
        character_coverage=0.98,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    size = model.vocab_size()
    types = [
        6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1
        for i in range(size)
    ]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([model.get_score(i) for i in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_space_prefix(add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = tokenizer_of(GGUFFile(tmp_path / "t.gguf"))
    samples = [text[i : i + 60] for i in range(0, 6000, 97)] + [
        "  a  b ",
        "漢字 🙂",
        "naïve é",
        "x",
    ]
    for sample in samples:
        ids = tokenizer.encode(sample, add_special_tokens=False)
        assert ids == model.encode(sample), sample
        assert tokenizer.decode(ids) == model.decode(ids), sample
    assert tokenizer.encode("x")[0] == model.bos_id()


def test_o200k_cuts_words_where_their_case_changes() -> None:
    """What OpenAI's published pattern does that none before it did."""
    cut = PRE_TOKENIZERS["gpt-4o"]().pre_tokenize_str("HelloWorld don't /a//b/\n\n12345  x")
    pieces = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut]
    assert pieces == [
        "Hello", "World", " don't", " /", "a", "//", "b", "/\n\n", "123", "45", " ", " x",
    ]  # fmt: skip


def test_o200k_is_the_published_pattern() -> None:
    """The source of OpenAI's own library, where it is installed, as the oracle."""
    published = pytest.importorskip("tiktoken_ext.openai_public", reason="needs tiktoken")
    source = inspect.getsource(published.o200k_base)
    parts = re.findall(r'r"""(.*?)"""', source)
    cut = json.loads(PRE_TOKENIZERS["gpt-4o"]().__getstate__())
    assert cut["pretokenizers"][0]["pattern"] == {"Regex": "|".join(parts)}


@pytest.mark.parametrize(
    ("specials", "ends"),
    [
        (["<|end|>", "<|endoftext|>"], ["<|end|>", "<|endoftext|>"]),
        (
            ["<|end|>", "<|endoftext|>", "<|return|>", "<|call|>", "<|channel|>"],
            ["<|return|>", "<|endoftext|>", "<|call|>"],
        ),
    ],
    ids=["phi", "gpt-oss"],
)
def test_end_of_a_message_is_no_end_of_a_turn(
    tmp_path: Path, specials: list[str], ends: list[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "gpt-oss")
    tokens = ["a", *specials]
    writer.add_token_list(tokens)
    writer.add_token_types([1] + [gguf.TokenType.CONTROL] * len(specials))
    writer.add_eos_token_id(tokens.index(ends[0]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = generation_config_of(GGUFFile(tmp_path / "t.gguf"))["eos_token_id"]
    assert {tokens[index] for index in found} == set(ends)
    assert tokens[found[0]] == ends[0]

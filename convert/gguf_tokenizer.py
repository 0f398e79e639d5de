"""A tokenizer rebuilt from GGUF metadata: vocabulary, merges, pre-tokenizer, special tokens."""

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.notices import warn_once

# Values of tokenizer.ggml.token_type that matter here.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "▁"
# Control tokens that end a turn or a document, whatever the file calls its one end token.
_END_TOKENS = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>",
     "<|end|>", "<eos>", "</s>"}
)  # fmt: skip
# Where these are, <|end|> ends one of several messages of a turn, thoughts for example (gpt-oss).
_ENDS_OF_HARMONY = frozenset({"<|return|>", "<|call|>"})

# The published pre-tokenizer patterns of the model families, as in their tokenizer.json.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_WORD_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_WORD_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split_by(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# tokenizer.ggml.pre -> how text is cut before merging.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "olmo": _byte_level,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "command-r": _single_digits,
    "llama-bpe": _split_by(_LLAMA3_PATTERN),
    "llama3": _split_by(_LLAMA3_PATTERN),
    "llama-v3": _split_by(_LLAMA3_PATTERN),
    "smaug-bpe": _split_by(_LLAMA3_PATTERN),
    "qwen2": _split_by(_QWEN2_PATTERN),
    "deepseek-r1-qwen": _split_by(_QWEN2_PATTERN),
    "gpt-4o": _split_by(_O200K_PATTERN),
}
_IGNORES_MERGES = frozenset({"llama-bpe", "llama3", "llama-v3"})
_NORMALIZES_NFC = frozenset({"qwen2"})


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer, with chat template, that a GGUF file describes.

    Raises:
        CheckpointError: the tokenizer's kind or pre-tokenizer is unknown, or parts are missing.
    """
    metadata = file.metadata
    tokens = _strings(file, "tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(file, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(file, tokens)
    else:
        raise CheckpointError(
            f"{file.path} has a tokenizer of the kind {kind!r:.60}; "
            "'gpt2' and 'llama' can be rebuilt"
        )
    types = _token_types(file, _NORMAL, len(tokens))
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token:
            special = token_type != _USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
            if tokenizer.token_to_id(token) != index:
                raise CheckpointError(f"{file.path}: token {token!r:.60} is there twice")
    ids = {
        role: _token_id(file, key)
        for role, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
    }
    roles = {role: tokens[index] for role, index in ids.items() if index is not None}
    # Llama's tokenizers put the beginning token in front unless the file says otherwise.
    adds_bos = metadata.get(
        "tokenizer.ggml.add_bos_token",
        kind == "llama" or metadata.get("tokenizer.ggml.pre") in _IGNORES_MERGES,
    )
    if adds_bos and "bos_token" in roles:
        bos = roles["bos_token"]
        before = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, ids["bos_token"])],
        )  # fmt: skip
        byte_level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = (
            before if kind == "llama" else processors.Sequence([byte_level, before])
        )
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=length,
        **roles,
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        wrapped.chat_template = template
    return wrapped


def generation_config_of(file: GGUFFile) -> dict[str, Any]:
    """Return the generation_config.json content: the ids that begin and end a text.

    ``eos_token_id`` is a list, the file's own end token first, then the other tokens with
    which a chat model of this vocabulary ends its turn.
    """
    tokens = _strings(file, "tokens")
    types = _token_types(file, _CONTROL, len(tokens))
    said = [_token_id(file, key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    ends = [index for index in said if index is not None]
    end_tokens = _END_TOKENS
    if _ENDS_OF_HARMONY.issubset(tokens):
        end_tokens = end_tokens - {"<|end|>"} | _ENDS_OF_HARMONY
    ends += [
        index
        for index, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type == _CONTROL and token in end_tokens
    ]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))}
    for key, role in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if (index := _token_id(file, role)) is not None:
            config[key] = index
    return config


def _strings(file: GGUFFile, key: str) -> list[str]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.{key}; it cannot be converted")
    return values


def _token_id(file: GGUFFile, key: str) -> int | None:
    """Return the id of a special token, None if the file has none or one that is no token."""
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    num_tokens = len(_strings(file, "tokens"))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_tokens:
        warn_once(
            f"{file.path}: tokenizer.ggml.{key} is {str(value)[:20]}, not one of {num_tokens} "
            "tokens; it is left out"
        )
        return None
    return value


def _token_types(file: GGUFFile, default: int, num_tokens: int) -> list[int]:
    """Return what each token is for; ``default`` for all if the file does not say."""
    types = file.metadata.get("tokenizer.ggml.token_type", [default] * num_tokens)
    if not isinstance(types, list) or len(types) != num_tokens:
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.token_type for its tokens")
    return types


def _byte_level_bpe(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as GPT-2 introduced it."""
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path} has the pre-tokenizer {pre!r:.60}; known are: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    merges = [_pair(file, merge) for merge in _strings(file, "merges")]
    vocabulary = _vocabulary(file, tokens)
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in _IGNORES_MERGES)
    except Exception as error:  # what tokenizers raises has no type of its own
        raise CheckpointError(f"{file.path}: its merges do not fit its tokens ({error})") from error
    tokenizer = Tokenizer(model)
    if pre in _NORMALIZES_NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator or not left or not right:
        raise CheckpointError(f"{file.path}: {merge!r:.60} is no merge of two tokens")
    return left, right


def _vocabulary(file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    num_empty = tokens.count("")
    if num_empty > 1:
        warn_once(f"{file.path}: {num_empty} tokens of its vocabulary are empty; they are left out")
        del vocabulary[""]
    if len(vocabulary) != len(tokens) - (num_empty if num_empty > 1 else 0):
        raise CheckpointError(f"{file.path}: its vocabulary has the same token twice")
    return vocabulary


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """Return a SentencePiece BPE tokenizer with byte fallback, as Llama 2 and Gemma have it.

    The file has scores, not merges. SentencePiece joins the two neighbours whose union has the
    best score; as merges these are all ways to split a piece into two pieces, best score first.
    """
    scores = file.metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, int | float) for score in scores)
    ):
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.scores for its tokens")
    vocabulary = _vocabulary(file, tokens)
    types = _token_types(file, _NORMAL, len(tokens))
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score, token_type in zip(tokens, scores, types, strict=True):
        if token_type != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    ranked.sort()
    unknown = _token_id(file, "unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for *_, pair in ranked],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[unknown or 0],
        )
    )
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", _SPACE)
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer

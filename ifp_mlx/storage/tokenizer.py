"""The tokenizer of a checkpoint directory, and what its chat template makes of messages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.transformers_import import finish_importing_transformers

if TYPE_CHECKING:  # mlx-lm brings transformers, which take more than a second to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class ChatTokenizer(Protocol):
    """What is used of an mlx-lm or transformers tokenizer."""

    eos_token_id: int
    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Return the ids of a text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the ids of a conversation."""


def load_tokenizer(path: Path) -> "TokenizerWrapper":
    """Return a checkpoint's tokenizer as mlx-lm wraps it: chat template, detokenizer, end ids.

    Raises:
        CheckpointError: the tokenizer files are missing or damaged.
    """
    finish_importing_transformers()
    from mlx_lm.utils import load_tokenizer as load_mlx_tokenizer

    end_ids = read_config(path).content.get("eos_token_id")
    try:
        tokenizer: TokenizerWrapper = load_mlx_tokenizer(
            path, {"trust_remote_code": False}, eos_token_ids=end_ids
        )
    except Exception as error:  # transformers and tokenizers raise plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason})") from error
    return tokenizer


def chat_ids(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return a conversation's ids up to where the assistant's next answer begins.

    Without a chat template the contents stand there as paragraphs.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer.encode("\n\n".join(message["content"] for message in messages)))
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False
    )
    return [int(token) for token in ids]

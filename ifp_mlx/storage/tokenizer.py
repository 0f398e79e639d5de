"""The tokenizer of a checkpoint directory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.config_file import check_links, read_config, read_json
from ifp_mlx.storage.transformers_import import finish_importing_transformers

if TYPE_CHECKING:  # mlx-lm brings transformers, which take more than a second to import
    from mlx_lm.tokenizer_utils import TokenizerWrapper


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_tokenizer(path: Path) -> "TokenizerWrapper":
    """Return a checkpoint's tokenizer as mlx-lm wraps it: chat template, detokenizer, end ids.

    Raises:
        CheckpointError: the tokenizer files are missing or damaged.
    """
    finish_importing_transformers()
    from mlx_lm.utils import load_tokenizer as load_mlx_tokenizer

    check_links(path, [path / name for name in TOKENIZER_FILES])
    config = read_config(path)

    def load(**settings: Any) -> "TokenizerWrapper":
        loaded: TokenizerWrapper = load_mlx_tokenizer(
            path,
            {"trust_remote_code": False, **settings},
            eos_token_ids=config.content.get("eos_token_id"),
        )
        return loaded

    try:
        tokenizer = load()
    except Exception as error:  # transformers and tokenizers raise plain Exceptions
        try:
            # It may be config.json, which transformers checks by other rules than mlx-lm.
            tokenizer = load(config=_plain_config(config.family.model_type))
        except Exception:
            for name in TOKENIZER_FILES:
                if name.endswith(".json") and (path / name).exists():
                    read_json(path / name)  # says so if it is the one that is damaged
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({reason})") from error
    if isinstance(templates := tokenizer.chat_template, dict) and len(templates) == 1:
        tokenizer.chat_template = next(iter(templates.values()))  # not named "default"
    return tokenizer


def _plain_config(model_type: str) -> Any:
    """Return a family's configuration for transformers as it is without a checkpoint."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()

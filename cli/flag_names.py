"""What a parameter that a library message names is called on the command line."""

import re

FLAGS = {
    "adapter": "--adapter",
    "bits": "--bits",
    "check": "--check",
    "data": "--data",
    "distillation": "--distillation",
    "dtype": "--dtype",
    "force": "--force",
    "group_size": "--group-size",
    "ignore_chat_template": "--ignore-chat-template",
    "keep_ratio": "--keep",
    "keep_units": "--keep-units",
    "lora_rank": "--lora-rank",
    "kv_bits": "--kv-bits",
    "max_kv_size": "--max-kv-size",
    "max_new_tokens": "--max-tokens",
    "no_save": "--no-save",
    "overwrite": "--force",
    "prompt_cache_file": "--prompt-cache-file",
    "repetition_penalty": "--repetition-penalty",
    "resume": "--resume",
    "skip_bad_lines": "--skip-bad-lines",
    "source": "--source",
    "start": "--from",
    "task": "--task",
    "tasks": "--tasks",
    "temperature": "--temp",
    "top_p": "--top-p",
}
"""Library messages set parameters in backquotes."""

_PARAMETER = re.compile(r"`([a-z_]+)`")


def in_flags(message: str) -> str:
    """Return a message of the library in the words of the command line."""
    return _PARAMETER.sub(lambda found: FLAGS.get(found[1], found[0]), message)

"""What the flags say about keys and values: how they are kept, and in which file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.chat.sampling import KVCacheOptions
from ifp_mlx.cli.help_sections import ADVANCED

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.chat.kv_cache_file import KVCacheFile
    from ifp_mlx.subnets.subnetwork import SubNetwork


@dataclasses.dataclass(frozen=True)
class KVFileOptions:
    """Where keys and values are kept from run to run."""

    prompt_cache_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache-file",
            metavar="FILE",
            help="Keep what the model has read (its keys and values) in this .safetensors file: "
            "the next run with the same sub-network reads only what is new.",
            rich_help_panel=ADVANCED,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse a path that cannot be written, before anything is computed for it."""
        if self.prompt_cache_file is not None:
            from ifp_mlx.chat.kv_cache_file import check_kv_path

            check_kv_path(self.prompt_cache_file)


@dataclasses.dataclass(frozen=True)
class KVFlags:
    """How keys and values are kept, and where."""

    max_kv_size: Annotated[
        int | None,
        typer.Option(
            "--max-kv-size",
            metavar="N",
            min=1,
            help="Remember only this many tokens of what was read and written.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    kv_bits: Annotated[
        int | None,
        typer.Option(
            "--kv-bits",
            metavar="N",
            help="Remember it in 2, 4 or 8 bits a number: less memory, less exact.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    file: KVFileOptions = KVFileOptions()

    @property
    def options(self) -> KVCacheOptions:
        """The library's form."""
        return KVCacheOptions(self.max_kv_size, self.kv_bits)


def begin_conversation(
    assistant: Assistant, subnet: SubNetwork, flags: KVFlags
) -> tuple[Conversation, KVCacheFile | None]:
    """Return a conversation that goes on from what its file holds, and that file, if one is wanted.

    Raises:
        UsageError: the file is damaged or something else, or the options do not fit the model.
    """
    conversation = assistant.converse(subnet, flags.options)
    if flags.file.prompt_cache_file is None:
        return conversation, None
    from ifp_mlx.chat.kv_cache_file import KVCacheFile

    identity = assistant.kv_identity(subnet) | dataclasses.asdict(flags.options)
    file = KVCacheFile(flags.file.prompt_cache_file, identity)
    kept = file.load()
    if kept is not None:
        conversation.kv_cache = kept
    return conversation, file

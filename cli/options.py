"""Flags that several commands share, each defined once, and groups of those that go together.

Names follow mlx-lm where it has them. How groups become flags: ``option_groups``.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.chat.sampling import SamplingOptions
from ifp_mlx.cli.help_sections import ADVANCED, SAMPLING, UNITS
from ifp_mlx.cli.terminal import is_one_of_several
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:  # the command line must not load mlx before a command needs it
    from ifp_mlx.slicing.compact import CutOptions

DEFAULT_MODEL = "smollm2-135m"


_PREFIXES = ("", "K", "M", "G", "T")


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as ``9GB``, ``800 MB`` or ``9.5G`` stands for.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--memory {text!r} is no size; write 9GB or 800MB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** _PREFIXES.index(match[2]))


def model_names() -> list[str]:
    """Return the names of the models that were pulled."""
    from ifp_mlx.storage.home import models_folder

    return sorted(path.parent.name for path in models_folder().glob("*/config.json"))


def preset_names() -> list[str]:
    """Return the names of the saved tasks."""
    from ifp_mlx.storage.home import presets_folder
    from ifp_mlx.subnets.presets import Presets

    return Presets(presets_folder()).names()


Model = Annotated[
    str,
    typer.Option(
        "--model",
        envvar="IFP_MODEL",
        autocompletion=model_names,
        metavar="MODEL",
        help="A model that ifp pull or ifp convert made: its name, or its folder.",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        "-t",
        metavar="SENTENCE",
        autocompletion=preset_names,
        help="What the model is for, in a sentence. It selects the task's sub-network, the part of "
        "the model that answers; that is cached, and ready at once the next time. Or the name of "
        "a task that ifp task save keeps.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Most memory to use, such as 9GB. Without --keep as much of the model is kept as fits "
        "there beside a conversation.",
        rich_help_panel=UNITS,
    ),
]
Selector = Annotated[
    str,
    typer.Option(
        "--selector",
        metavar="NAME",
        help="What picks the units. auto takes the first of these that the model has: predictor "
        "(trained; in an adapter), blend (the text, and what ifp calibrate found), static (only "
        "what ifp calibrate found; static:TASK for one of its tasks), prompt (only the text). "
        "random is for comparison.",
        rich_help_panel=UNITS,
    ),
]
Reuse = Annotated[
    float,
    typer.Option(
        "--reuse",
        metavar="OVERLAP",
        min=0.0,
        max=1.0,
        help="Take the cached sub-network of another task if it has at least this share of its "
        "units in common with what is selected, such as 0.85; 0 never does.",
        rich_help_panel=UNITS,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        "-m",
        min=1,
        metavar="N",
        help="Longest answer, in tokens: words or pieces of words.",
    ),
]
Temp = Annotated[
    float,
    typer.Option(
        "--temp",
        min=0.0,
        metavar="T",
        help="Temperature: 0 always takes the likeliest token, more makes answers more varied.",
    ),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        "--system-prompt",
        metavar="TEXT",
        help="What the model is told before the conversation: how to answer, for example.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and which of its adapters."""

    model: Model = DEFAULT_MODEL
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            metavar="FOLDER",
            help="The folder of an adapter, which ifp train made for this model, to use instead of "
            "the one that comes with it.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    no_adapter: Annotated[
        bool,
        typer.Option(
            "--no-adapter", help="Use the model without any adapter.", rich_help_panel=ADVANCED
        ),
    ] = False

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other."""
        if self.adapter is not None and self.no_adapter:
            raise UsageError("--adapter and --no-adapter exclude each other; give one")


@dataclasses.dataclass(frozen=True)
class Amount:
    """How many units a sub-network keeps; the model's default if neither flag says."""

    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            metavar="RATIO",
            help="Share of the model's units to keep, above 0 up to 1, such as 0.5. Units are "
            "those of each layer's feed-forward network (FFN), or the experts of a mixture of "
            "experts.",
            rich_help_panel=UNITS,
        ),
    ] = None
    keep_units: Annotated[
        int | None,
        typer.Option(
            "--keep-units",
            "--keep-experts",
            metavar="K",
            help="The same as a number: FFN units of each layer, in multiples of 64, or experts.",
            rich_help_panel=UNITS,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other."""
        if self.keep is not None and self.keep_units is not None:
            raise UsageError("--keep and --keep-units exclude each other; give one")

    @property
    def is_given(self) -> bool:
        """Whether either flag says it."""
        return self.keep is not None or self.keep_units is not None


@dataclasses.dataclass(frozen=True)
class SubnetOptions:
    """Which part of the model answers."""

    task: Task = None
    amount: Amount = Amount()
    dense: Annotated[
        bool, typer.Option("--dense", help="Use the whole model.", rich_help_panel=UNITS)
    ] = False

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other, before a model is loaded for them."""
        if self.dense and self.amount.is_given:
            raise UsageError("--dense keeps every unit; leave out --keep and --keep-units")
        if self.task is not None and not self.task.strip():
            raise UsageError("--task is empty; describe the task in a sentence, or leave it out")

    @property
    def needs_dense_model(self) -> bool:
        """Whether the dense model is needed for sure: to answer, or to read the first message."""
        return self.dense or self.task is None


@dataclasses.dataclass(frozen=True)
class AssistantOptions:
    """What an assistant is made of: a model, what picks its units, and how they are cut."""

    selector: Selector = "auto"
    reuse: Reuse = 0.0
    read_with: Annotated[
        str,
        typer.Option(
            "--read-with",
            metavar="WHAT",
            help="What reads prompts. whole: the model that answers. part: the sub-network, and "
            "the whole model then writes, so that the answer to a long prompt begins sooner. auto: "
            "part, where ifp fit found it as good for the task.",
            rich_help_panel=UNITS,
        ),
    ] = "auto"
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Neither read nor write the cache of sub-networks.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    exact_down: Annotated[
        bool,
        typer.Option(
            "--exact-down",
            help="Of a quantized model, pack nothing again: neither columns of down projections, "
            "nor what an adapter changed. Exact, slower, and in more memory.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    memory: Memory = None
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Load the sub-network even if it is predicted not to fit in memory.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    source: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        """Refuse what is no reader."""
        if self.read_with not in ("auto", "part", "whole"):
            raise UsageError(f"--read-with is auto, part or whole, not {self.read_with!r}")

    def with_model(self, model: str) -> "AssistantOptions":
        """Return the same with another model."""
        return dataclasses.replace(self, source=dataclasses.replace(self.source, model=model))

    @property
    def cut(self) -> "CutOptions":
        """How sub-networks are cut."""
        from ifp_mlx.slicing.compact import CutOptions

        return CutOptions(
            exact_down=self.exact_down, memory_bytes=self.memory_bytes, force=self.force
        )

    @property
    def memory_bytes(self) -> int | None:
        """The most memory to use; None is what the machine has.

        Raises:
            UsageError: the size is no amount of memory.
        """
        return None if self.memory is None else parse_bytes(self.memory)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How answers are drawn."""

    max_tokens: MaxTokens = 512
    temp: Temp = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            metavar="P",
            help="Draw from the likeliest tokens that together have this probability; 1 is all.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            min=0,
            metavar="N",
            help="Draw from this many of the likeliest tokens; 0 is all.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            min=0.0,
            max=1.0,
            metavar="P",
            help="Leave out tokens whose probability is below this share of the likeliest's.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            metavar="X",
            help="Against loops: above 1, such as 1.1, makes the last 20 tokens, the prompt's as "
            "well, less likely to come again. Off if not given.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Draw the same answer every time, also above temperature 0.",
            rich_help_panel=SAMPLING,
        ),
    ] = None

    @property
    def options(self) -> SamplingOptions:
        """The library's form.

        Raises:
            UsageError: a value is out of range.
        """
        return SamplingOptions(
            max_new_tokens=self.max_tokens,
            temperature=self.temp,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            # Several machines must draw alike.
            seed=0 if self.seed is None and is_one_of_several() else self.seed,
        )

"""Flags that several commands share, each defined once, and groups of those that go together.

Names follow mlx-lm where it has them. How groups become flags: ``option_groups``.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifp_mlx.chat.sampling import SamplingOptions
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
        help="What the model is for, in a sentence: it selects the sub-network, which is cached. "
        "Without it the first message selects.",
    ),
]
Selector = Annotated[
    str,
    typer.Option(
        "--selector",
        metavar="NAME",
        help="What picks the units: predictor, blend, static, static:TASK, prompt or random; "
        "auto takes the best that this model has.",
    ),
]
Reuse = Annotated[
    float,
    typer.Option(
        "--reuse",
        metavar="OVERLAP",
        min=0.0,
        max=1.0,
        help="Take the cached sub-network of another description if their units overlap by at "
        "least this much, such as 0.85; 0 always selects.",
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", "-m", min=1, metavar="N", help="Longest answer, in tokens."),
]
Temp = Annotated[
    float,
    typer.Option("--temp", min=0.0, metavar="T", help="Sampling temperature; 0 is greedy."),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        "--system-prompt", metavar="TEXT", help="A system message before the conversation."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and which of its adapters."""

    model: Model = DEFAULT_MODEL
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            metavar="FOLDER",
            help="An IFP adapter folder to use instead of the one in the model's ifp/ folder.",
        ),
    ] = None
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Use the model without any adapter.")
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
            help="Share of the units to keep, above 0 up to 1: of the FFN units of each layer, or "
            "of the experts of a mixture.",
        ),
    ] = None
    keep_units: Annotated[
        int | None,
        typer.Option(
            "--keep-units",
            "--keep-experts",
            metavar="K",
            help="Units to keep in each layer: FFN units, in multiples of 64, or experts.",
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
    dense: Annotated[bool, typer.Option("--dense", help="Use the whole model, for comparison.")] = (
        False
    )

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
            help="What reads prompts. With part the sub-network only reads, and the whole model "
            "writes: the first token of a long prompt comes sooner. With whole nothing does so. "
            "auto takes part where ifp fit found that it is as good for the task.",
        ),
    ] = "auto"
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor write the sub-network cache.")
    ] = False
    exact_down: Annotated[
        bool,
        typer.Option(
            "--exact-down",
            help="Of a quantized model, do not quantize columns of down projections again, at 8 "
            "bits: exact, slower, and in more memory if few units are kept.",
        ),
    ] = False
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Most memory to use, such as 9GB. If no amount of units is given, as many are "
            "kept as fit there with a conversation.",
        ),
    ] = None
    force: Annotated[
        bool,
        typer.Option("--force", help="Load the sub-network even if it is predicted not to fit."),
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
            help="Sample from the most likely tokens of this total probability.",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            min=0,
            metavar="N",
            help="Sample from this many of the most likely tokens; 0 is all.",
        ),
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            min=0.0,
            max=1.0,
            metavar="P",
            help="Drop tokens less likely than this share of the likeliest.",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            metavar="X",
            help="Against loops: above 1, such as 1.1, makes each of the last 20 tokens, of the "
            "prompt as well, less likely to come again. Off if not given.",
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Makes sampling repeatable.")
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
            seed=self.seed,
        )

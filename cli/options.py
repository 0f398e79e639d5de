"""Flags that several commands share, each defined once. Names follow mlx-lm where it has them."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m"


def model_names() -> list[str]:
    """Return the names of the models that were pulled."""
    from ifp_mlx.storage.home import models_folder

    return sorted(path.parent.name for path in models_folder().glob("*/config.json"))


def session_names() -> list[str]:
    """Return the names of the saved chats, the latest first."""
    from ifp_mlx.chat.session import list_sessions
    from ifp_mlx.storage.home import sessions_folder

    return [summary.name for summary in list_sessions(sessions_folder())]


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
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="An IFP adapter folder to use instead of the one in the model's ifp/ folder.",
    ),
]
NoAdapter = Annotated[
    bool,
    typer.Option("--no-adapter", help="Use the model without any adapter."),
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
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="RATIO",
        help="Share of the FFN units to keep, above 0 up to 1; rounded to the nearest 64 units.",
    ),
]
KeepUnits = Annotated[
    int | None,
    typer.Option(
        "--keep-units",
        metavar="K",
        help="FFN units to keep in each layer: a multiple of 64, or all of them.",
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
Dense = Annotated[
    bool,
    typer.Option("--dense", help="Use the whole model, for comparison."),
]
Compensate = Annotated[
    bool,
    typer.Option(
        "--compensate/--no-compensate", help="Add the removed units' mean contribution as a bias."
    ),
]
Reuse = Annotated[
    float | None,
    typer.Option(
        "--reuse",
        metavar="OVERLAP",
        min=0.0,
        max=1.0,
        help="Take the cached sub-network of another description if their units overlap by at "
        "least this much; 0 turns it off. With the predictor 0.85 if not given, otherwise 0.",
    ),
]
ExactDown = Annotated[
    bool,
    typer.Option(
        "--exact-down",
        help="Of a quantized model, do not quantize columns of down projections again, at 8 bits: "
        "exact, slower, and in more memory if few units are kept.",
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Load the sub-network even if it is predicted not to fit."),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither read nor write the sub-network cache."),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", "-m", min=1, metavar="N", help="Longest answer, in tokens."),
]
Temp = Annotated[
    float,
    typer.Option("--temp", min=0.0, metavar="T", help="Sampling temperature; 0 is greedy."),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        metavar="P",
        help="Sample from the most likely tokens of this total probability.",
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        "--top-k",
        min=0,
        metavar="N",
        help="Sample from this many of the most likely tokens; 0 is all.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        metavar="P",
        help="Drop tokens less likely than this share of the likeliest.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Against loops: above 1, such as 1.1, makes each of the last 20 tokens, of the prompt "
        "as well, less likely to come again. Off if not given.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Makes sampling repeatable."),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        "--system-prompt", metavar="TEXT", help="A system message before the conversation."
    ),
]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache-file",
        metavar="FILE",
        help="Keep the keys and values of the conversation in this .safetensors file: the next "
        "run with the same sub-network reads only what is new.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Let the sub-network draft and the whole model check: the words are the whole "
        "model's. The statistics show how many drafted tokens it accepted.",
    ),
]
NumDraftTokens = Annotated[
    int,
    typer.Option(
        "--num-draft-tokens",
        metavar="N",
        min=1,
        help="With --lossless: tokens drafted before each check.",
    ),
]

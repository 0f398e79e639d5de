"""``ifp export``: a sub-network becomes an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ifp_mlx.cli import options, writing_options
from ifp_mlx.cli.help_sections import UNITS
from ifp_mlx.cli.loading import choose_subnetwork, describe_subnetwork, load_assistant
from ifp_mlx.cli.measuring import measuring
from ifp_mlx.cli.option_groups import expands_options
from ifp_mlx.cli.presets import amount_of, find_preset
from ifp_mlx.cli.progress import bytes_progress
from ifp_mlx.cli.terminal import gigabytes, print_json, say
from ifp_mlx.cli.writing_options import DtypeName, dtype_named, refuse_existing
from ifp_mlx.errors import UsageError

if TYPE_CHECKING:
    from ifp_mlx.assistant import Assistant
    from ifp_mlx.convert.model_card import MeasuredQuality
    from ifp_mlx.subnets.subnetwork import SubNetwork

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]


@expands_options
def export(
    *,
    output: writing_options.Output,
    task: options.Task = None,
    selection: Annotated[
        Path | None,
        typer.Option(
            "--selection",
            metavar="FILE",
            help="Take the units of a selection file, such as ifp/selection.safetensors of an "
            "exported model.",
            rich_help_panel=UNITS,
        ),
    ] = None,
    amount: options.Amount,
    selector: options.Selector = "auto",
    source: options.ModelOptions,
    quantization_flags: writing_options.QuantizationFlags,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Write packed weights as plain ones, which transformers can read.",
            rich_help_panel=writing_options.FORM,
        ),
    ] = False,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="Floating type to write.",
            show_default="the model's own",
            rich_help_panel=writing_options.FORM,
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            metavar="FILE",
            help="Also write the sub-network as a GGUF file, for llama.cpp.",
            rich_help_panel=writing_options.FORM,
        ),
    ] = None,
    gguf_type: Annotated[
        GGUFType,
        typer.Option(
            help="How the GGUF file stores matrices.", rich_help_panel=writing_options.FORM
        ),
    ] = "f16",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Held-out text, as for ifp eval: measure the sub-network on it and say so in the "
            "model card.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Examples of each domain to measure.")] = 5,
    force: writing_options.Overwrite = False,
    json_output: options.AsJson = False,
) -> None:
    """Write a task's sub-network as a model folder of its own, which other programs load.

    It loads in mlx-lm, and in transformers unless its weights are packed.
    """
    if (task is None) == (selection is None):
        raise UsageError("give --task or --selection, one of them")
    preset = find_preset(task)
    if preset is not None:
        task, amount = preset.task, amount if amount.is_given else amount_of(preset)
    refuse_existing(output, force=force)
    if gguf is not None:
        refuse_existing(gguf, force=force)
    quantization = quantization_flags.quantization
    if dequantize and quantization is not None:
        raise UsageError("--dequantize and --quantize exclude each other; give one")
    subnet_options = options.SubnetOptions(task, amount)
    # What is written in another form is not rounded for this one first.
    exact_down = dequantize or quantization is not None
    assistant = load_assistant(
        options.AssistantOptions(selector, exact_down=exact_down, source=source), as_stored=True
    )
    subnet = _subnetwork(assistant, subnet_options, selection)
    if subnet.selection is None:
        raise UsageError("all units are kept: that is the model itself; ifp quantize copies it")
    say(describe_subnetwork(subnet))

    from ifp_mlx.convert.export import export_checkpoint
    from ifp_mlx.convert.model_card import ModelCard
    from ifp_mlx.storage.origin import read_origin

    origin = read_origin(assistant.model_path)
    card = ModelCard(
        base_model=origin.base_model,
        licence=origin.licence,
        task=task,
        selector=str(subnet.selector),
        num_kept_units=subnet.num_kept_units,
        num_units=subnet.num_units,
        num_layers=len(subnet.selection.pick.layers),
        unit_label=subnet.kind.label,
        active_parameters=subnet.size.parameters,
        total_parameters=subnet.source.parameters,
        adapted=assistant.files.is_adapted,
        requantization_error=subnet.requantization_error,
        quality=_measure(assistant, subnet, data, limit) if data is not None else {},
    )
    with bytes_progress() as progress:
        made = export_checkpoint(
            subnet.model,
            subnet.selection,
            assistant.model_path,
            output,
            card,
            quantization=quantization,
            dequantize=dequantize,
            dtype=dtype_named(dtype),
            overwrite=force,
            progress=progress,
        )
        if gguf is not None:
            from ifp_mlx.convert.gguf_export import export_gguf

            export_gguf(made.path, gguf, gguf_type, overwrite=force, progress=progress)
    if json_output:
        print_json(
            {
                "path": str(made.path),
                "num_bytes": made.num_bytes,
                "is_plain": made.is_plain,
                "gguf": None if gguf is None else str(gguf),
                "selector": str(subnet.selector),
                "num_kept_units": subnet.num_kept_units,
                "num_units": subnet.num_units,
                "active_parameters": subnet.size.parameters,
                "total_parameters": subnet.source.parameters,
            }
        )
        return
    widths = "".join(f", {key} {subnet.num_kept_units}" for key in subnet.kind.config_fields)
    say(f"{made.path}: {gigabytes(made.num_bytes)}{widths}")
    if gguf is not None:
        say(f"{gguf}: {gigabytes(gguf.stat().st_size)}")
    if not made.is_plain:
        say("its weights are packed, for mlx-lm; --dequantize writes them for transformers")


def _subnetwork(
    assistant: Assistant, subnet_options: options.SubnetOptions, file: Path | None
) -> SubNetwork:
    if file is None:
        return choose_subnetwork(assistant, subnet_options, "")
    if subnet_options.amount.is_given:
        raise UsageError("--selection says how many units; leave out --keep and --keep-units")
    from ifp_mlx.selection.selection import Selection

    return assistant.subnetwork_of(Selection.load(file)[0])


def _measure(
    assistant: Assistant, subnet: SubNetwork, data: Path, limit: int
) -> dict[str, MeasuredQuality]:
    """Return the cross-entropy of the dense model and of the sub-network on held-out text."""
    from ifp_mlx.convert.model_card import MeasuredQuality
    from ifp_mlx.evaluation.quality import evaluate, load_held_out
    from ifp_mlx.slicing.forms import as_computed
    from ifp_mlx.storage.weights import automatic_dtype

    domains = load_held_out(data, assistant.tokenizer, limit)
    examples = [example for domain in domains.values() for example in domain]
    with measuring() as progress:
        dense = evaluate(
            assistant.dense().model, examples, lambda batch: None,
            progress=lambda done, total: progress("dense", done, total),
        )  # fmt: skip
        compact = evaluate(
            as_computed(subnet.model, automatic_dtype(subnet.model)), examples, lambda batch: None,
            progress=lambda done, total: progress("sub-network", done, total),
        )  # fmt: skip
    return {
        domain: MeasuredQuality(
            dense[domain].cross_entropy, compact[domain].cross_entropy, dense[domain].num_tokens
        )
        for domain in dense
    }

"""The README.md of an exported sub-network."""

import dataclasses
from collections.abc import Mapping

MIN_TOKENS = 100
"""A mean over fewer says nothing about a domain."""

_UNKNOWN = "unknown; see the base model"


@dataclasses.dataclass(frozen=True)
class MeasuredQuality:
    """Cross-entropy on one domain of held-out text, nats a token."""

    dense: float
    compact: float
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is said about an exported sub-network.

    Attributes:
        base_model: hub id of the dense model; None if it is not known.
        licence: of the base model's weights.
        task: the description that selected the units; None for a selection file.
        selector: what selected them.
        num_kept_units: K.
        num_units: F.
        num_layers: L.
        unit_label: what the units are called, in the plural.
        active_parameters: of the sub-network.
        total_parameters: of the dense model.
        adapted: an IFP adapter has changed the weights that were cut.
        requantization_error: relative error of packing weights again, 0 if none were.
        quality: domain -> cross-entropy, where it was measured.
    """

    base_model: str | None
    licence: str | None
    task: str | None
    selector: str
    num_kept_units: int
    num_units: int
    num_layers: int
    unit_label: str
    active_parameters: int
    total_parameters: int
    adapted: bool = False
    requantization_error: float = 0.0
    quality: Mapping[str, MeasuredQuality] = dataclasses.field(default_factory=dict)

    def text(self, name: str) -> str:
        """Return the card as Markdown, with the metadata that model hubs read at its top."""
        head = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
        head += [f"license: {self.licence}"] if self.licence else []
        head += [f"base_model: {self.base_model}"] if self.base_model else []
        head += ["tags:", "- mlx", "- instruction-following-pruning", "---"]
        purpose = (
            f"The units were selected for this task:\n\n> {' '.join(self.task.split())}"
            if self.task
            else "The units come from a selection file."
        )
        facts = {
            "Base model": self.base_model or "unknown",
            "Licence": self.licence or _UNKNOWN,
            f"{self.unit_label[0].upper()}{self.unit_label[1:]} kept": (
                f"{self.num_kept_units} of {self.num_units} in each of {self.num_layers} layers"
            ),
            "Selector": self.selector,
            "Parameters": f"{self.active_parameters:,} of {self.total_parameters:,}",
        }
        if self.adapted:
            facts["Weights"] = "changed by an IFP adapter, then cut"
        if self.requantization_error:
            facts["Weights packed again"] = f"relative error {self.requantization_error:.2e}"
        table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
        return "\n".join(
            [
                *head,
                "",
                f"# {name}",
                "",
                "A sub-network of a larger language model, cut out with Instruction-Following "
                f"Pruning: an ordinary model of the same architecture, fewer {self.unit_label}.",
                "",
                purpose,
                "",
                *table,
                "",
                "## Measured quality",
                "",
                *self._quality_lines(),
                "",
            ]
        )

    def _quality_lines(self) -> list[str]:
        if not self.quality:
            return ["Not measured. For text outside its task expect worse answers than the base's."]
        rows = [
            f"| {domain} | {value.dense:.3f} | {value.compact:.3f} | {value.num_tokens:,} |"
            for domain, value in sorted(self.quality.items())
            if value.num_tokens >= MIN_TOKENS
        ]
        lines = [
            "Cross-entropy on held-out text, nats a token, lower is better.",
            "",
            "| domain | base model | this model | tokens |",
            "|---|---|---|---|",
            *rows,
        ]
        short = [d for d, value in sorted(self.quality.items()) if value.num_tokens < MIN_TOKENS]
        if short:
            lines += ["", f"Fewer than {MIN_TOKENS} tokens, left out: {', '.join(short)}."]
        return lines

"""How much of a mixture one task needs: cross-entropy of sub-networks with a part of its experts.

    python measure_mixture.py MODEL_FOLDER DATA_FOLDER OUT.json --dense START_FOLDER

MODEL_FOLDER is a mixture (train_mixture.py writes one); DATA_FOLDER holds ``sft`` and ``pretrain``
(text that selects) and ``eval`` (text that is scored). Passes come in the order of their weight and
the file is written after each, so that a run that is stopped keeps its figures.
"""

from ifp_mlx.blas import prefer_openblas

prefer_openblas()  # before mlx is imported

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from evidence import Evidence, read_examples  # noqa: E402
from expert_products import choose_products, with_zero_slots  # noqa: E402

from ifp_mlx.benchmarking.timing import machine  # noqa: E402
from ifp_mlx.chat.chat_template import chat_ids  # noqa: E402
from ifp_mlx.evaluation.quality import (  # noqa: E402
    HeldOutExample,
    evaluate,
    load_held_out,
    load_task_descriptions,
)
from ifp_mlx.evaluation.subject import TASK_DESCRIPTIONS  # noqa: E402
from ifp_mlx.selection.reading import pad_right  # noqa: E402
from ifp_mlx.selection.selection import Selection  # noqa: E402
from ifp_mlx.selection.selectors import select_random  # noqa: E402
from ifp_mlx.slicing.compact import slice_model  # noqa: E402
from ifp_mlx.slicing.drift import with_drift  # noqa: E402
from ifp_mlx.storage.config_file import read_config  # noqa: E402
from ifp_mlx.storage.files import write_bytes_atomically  # noqa: E402
from ifp_mlx.storage.tokenizer import load_tokenizer  # noqa: E402
from ifp_mlx.storage.weights import load_model  # noqa: E402
from ifp_mlx.units.amounts import Amounts  # noqa: E402
from ifp_mlx.units.modules import (  # noqa: E402
    family_of,
    plain_linear,
    trunk,
    unit_shape,
    with_parts,
)

FIRST = ("task64", "generic", "random0")
OTHERS = (
    "requests64",
    "task8",
    "description",
    "blend0.7",
    "requests8",
    "task64:reap",
    "task64:frequency",
    "task64:gate",
    "task64:norm",
    "blend0.5",
    "random1",
    "random2",
)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One row of the table: which experts each domain's texts are read with.

    Attributes:
        criterion: what selects, see ``evidence``.
        num_kept: experts a layer.
        variant: ``sliced``; ``zero``, removed experts give nothing, but their slots stay; or
            ``drift``, the share of gate mass that falls on missing experts.
        rotation: 0 scores a domain with its own selection, r with that of the r-th domain behind.
        task: all domains are read with this one's selection.
    """

    criterion: str
    num_kept: int
    variant: str = "sliced"
    rotation: int = 0
    task: str | None = None

    @property
    def name(self) -> str:
        """A key for JSON."""
        if self.variant == "drift":
            return f"{self.criterion}@{self.num_kept}"
        if self.task is not None:
            return f"matrix/{self.task}@{self.num_kept}"
        return f"{self.criterion}@{self.num_kept}/{self.variant}/{self.rotation}"


def plan(amounts: Sequence[int], half: int, tasks: Sequence[str]) -> list[Pass]:
    """Return the passes, those that answer the main questions first.

    Args:
        amounts: experts kept.
        half: that which every task is read with on every domain; one of ``amounts`` or 0.
        tasks: domains that have examples.
    """
    passes = [Pass(c, n) for c in FIRST for n in amounts]
    passes += [Pass("task64", n, "zero") for n in amounts]
    passes += [Pass("task64", n, rotation=5) for n in amounts]
    passes += [Pass("task64", half, "drift")] * bool(half)
    passes += [Pass(c, n) for c in OTHERS[:4] for n in amounts]
    passes += [Pass("task64", n, "drift") for n in amounts if n != half]
    passes += [Pass(c, n) for c in OTHERS[4:] for n in amounts]
    passes += [Pass(c, n, "zero") for c in ("generic", "random0") for n in amounts]
    passes += [Pass("task64", half, task=task) for task in tasks if half]
    passes += [Pass("task64", n, "zero", 5) for n in amounts]
    passes += [Pass("task64", n, rotation=r) for r in (3, 9) for n in amounts]
    return passes


class Measurement:
    """A mixture, its texts, and the file of figures."""

    def __init__(
        self,
        model: nn.Module,
        texts: dict[str, list[HeldOutExample]],
        out: Path,
        minutes: float,
        drift_texts: int,
    ):
        self.model = model
        self.texts = texts
        self.drift_texts = drift_texts
        self.report: dict[str, Any] = {
            "scored_tokens": {
                domain: [len(text.token_ids) - text.num_prompt_tokens for text in of_domain]
                for domain, of_domain in texts.items()
            },
            "passes": {},
            "drift": {},
        }
        self._out = out
        self._begin = time.perf_counter()
        self._end = self._begin + 60 * minutes

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{time.perf_counter() - self._begin:.0f} s] {text}", flush=True)

    def write(self) -> None:
        """Write what is known."""
        write_bytes_atomically(self._out, json.dumps(self.report).encode())

    def whole(self, name: str, model: nn.Module) -> None:
        """Measure a model on everything."""
        self._keep(name, losses(model, self.texts))

    def run(self, evidence: Evidence, passes: Sequence[Pass]) -> None:
        """Measure sub-networks until the time is over."""
        longest = 0.0
        for number, one in enumerate(passes):
            start = time.perf_counter()
            if start + 1.2 * longest > self._end:
                self.report["left_out"] = [left.name for left in passes[number:]]
                self.say(f"time is over, {len(passes) - number} passes left out")
                break
            if one.variant == "drift":
                self._drift(evidence, one)
            else:
                self._losses(evidence, one)
                longest = max(longest, time.perf_counter() - start)
        self.write()

    def _losses(self, evidence: Evidence, one: Pass) -> None:
        alike: dict[str, tuple[Selection, list[str]]] = {}
        tasks = evidence.domains
        for domain in self.texts:
            chooser = one.task or domain
            if one.rotation:
                if domain not in tasks:
                    continue
                chooser = tasks[(tasks.index(domain) + one.rotation) % len(tasks)]
            selection = evidence.select(one.criterion, chooser, one.num_kept)
            if selection is not None:
                alike.setdefault(selection.digest, (selection, []))[1].append(domain)
        found: dict[str, list[float]] = {}
        for selection, domains in alike.values():
            cut = with_zero_slots if one.variant == "zero" else slice_model
            subnet = cut(self.model, selection)
            mx.eval(subnet.parameters())
            found |= losses(subnet, {domain: self.texts[domain] for domain in domains})
        self._keep(one.name, found)

    def _drift(self, evidence: Evidence, one: Pass) -> None:
        """Have each task's sub-network read its own texts and other domains', one at a time."""
        found: dict[str, dict[str, list[float]]] = {}
        for task in evidence.domains:
            selection = evidence.select(one.criterion, task, one.num_kept)
            assert selection is not None
            watched, drift = with_drift(slice_model(self.model, selection), selection, self.model)
            mx.eval(watched.parameters())
            for domain, texts in self.texts.items():
                shares = found.setdefault(task, {}).setdefault(domain, [])
                num_texts = self.drift_texts * (4 if domain == task else 1)
                for text in texts[:num_texts]:
                    drift.reset()
                    mx.eval(trunk(watched)(mx.array([text.token_ids])))
                    shares.append(round(drift.share() or 0.0, 4))
        own = np.mean([np.mean(of[task]) for task, of in found.items()])
        others = [np.mean(of[d]) for task, of in found.items() for d in of if d != task]
        self.report["drift"][one.name] = found
        self.write()
        self.say(f"drift {one.name}: own {own:.3f}, others {np.mean(others):.3f}")

    def _keep(self, name: str, sums: dict[str, list[float]]) -> None:
        self.report["passes"][name] = sums
        self.write()
        tokens = self.report["scored_tokens"]
        mean = np.mean([sum(values) / sum(tokens[domain]) for domain, values in sums.items()])
        self.say(f"{name}: {mean:.4f} ({len(sums)} domains)")


def losses(model: nn.Module, texts: dict[str, list[HeldOutExample]]) -> dict[str, list[float]]:
    """Return each text's summed cross-entropy, by domain. Evaluates."""
    numbered = [
        dataclasses.replace(text, domain=f"{domain} {number}")
        for domain, of_domain in texts.items()
        for number, text in enumerate(of_domain)
    ]
    qualities = evaluate(model, numbered, lambda batch: None)
    return {
        domain: [
            round(one.cross_entropy * one.num_tokens, 3)
            for number in range(len(of_domain))
            for one in [qualities[f"{domain} {number}"]]
        ]
        for domain, of_domain in texts.items()
    }


def slices_against_masks(model: nn.Module, ids: mx.array) -> dict[str, float]:
    """Return how far a slice's logits are from those of the whole with other experts forbidden."""
    num_kept = max(unit_shape(model).num_units // 2, 4)
    selection = select_random(model, num_kept, seed=7)
    penalties = mx.where(selection.pick.mask() > 0, 0.0, -mx.inf)  # (L, E)
    router = family_of(model).kind.parts[0]
    masked = with_parts(
        model,
        router,
        lambda position, gate: plain_linear(
            gate.weight, penalties[position].astype(gate.weight.dtype)
        ),
    )
    whole, by_mask, by_slice = (
        one(ids).astype(mx.float32) for one in (model, masked, slice_model(model, selection))
    )
    return {
        "slice_against_mask": mx.abs(by_slice - by_mask).max().item(),  # type: ignore[dict-item]
        "slice_against_whole": mx.abs(by_slice - whole).max().item(),  # type: ignore[dict-item]
    }


def main() -> None:
    """Measure what the command line says."""
    arguments = _parse_arguments()
    dtype = getattr(mx, arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    texts = load_held_out(arguments.data / "eval", tokenizer, arguments.limit)
    model, _ = load_model(arguments.model, dtype)
    measurement = Measurement(model, texts, arguments.out, arguments.minutes, arguments.drift_texts)
    report = measurement.report
    few = {domain: of_domain[:8] for domain, of_domain in texts.items()}
    measurement.model, report["products"] = choose_products(model, lambda one: losses(one, few))
    ids, _ = pad_right([of_domain[0].token_ids for of_domain in texts.values()][:4])
    report["check"] = slices_against_masks(measurement.model, ids)
    shape = unit_shape(model)
    config = read_config(arguments.model)
    report |= {
        "machine": machine(),
        "model": {
            "layers": len(shape.layers),
            "experts": shape.num_units,
            "top_k": config.content["num_experts_per_tok"],
            "expert_units": config.content["intermediate_size"],
        },
        "settings": {
            name: getattr(arguments, name) for name in ("keep", "limit", "drift_texts", "dtype")
        },
    }
    measurement.say(json.dumps({name: report[name] for name in ("products", "check")}))
    measurement.whole("whole", measurement.model)
    if arguments.dense:
        measurement.whole("dense start", load_model(arguments.dense, dtype)[0])
    examples = {domain: read_examples(arguments.data, domain, tokenizer) for domain in texts}
    descriptions = {
        domain: chat_ids(tokenizer, [{"role": "user", "content": text}])
        for domain, text in load_task_descriptions(arguments.descriptions).items()
    }
    measurement.say("examples read")
    evidence = Evidence(
        measurement.model,
        {domain: of_domain for domain, of_domain in examples.items() if of_domain is not None},
        descriptions,
    )
    report["selecting_domains"] = evidence.domains
    report["routing"] = evidence.routing_figures()
    measurement.say("experts scored")
    amounts = Amounts.of(config, shape.num_units)
    shares = [float(share) for share in arguments.keep.split(",")]
    kept = sorted({amounts.nearest(share) for share in shares}, reverse=True)
    half = amounts.nearest(0.5)
    measurement.run(evidence, plan(kept, half if half in kept else 0, evidence.domains))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="checkpoint folder of a mixture")
    parser.add_argument("data", type=Path, help="folder with sft, pretrain and eval")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--dense", type=Path, help="the dense model that it grew from")
    parser.add_argument("--descriptions", type=Path, default=TASK_DESCRIPTIONS)
    parser.add_argument("--keep", default="0.875,0.75,0.625,0.5,0.25", help="%(default)s")
    parser.add_argument("--limit", type=int, default=40, help="texts a domain: %(default)s")
    parser.add_argument("--drift-texts", type=int, default=4, help="a domain: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--minutes", type=float, default=5.0, help="then stop with what there is")
    return parser.parse_args()


if __name__ == "__main__":
    main()

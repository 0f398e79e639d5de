"""Make a small mixture of experts that was really trained, from a dense llama, by the clock.

    python train_mixture.py SMOLLM2_FOLDER ROWS.npz OUT_FOLDER --minutes 11

Every layer's feed-forward units are cut into slices, and every slice is copied: with 4 slices and
32 experts, variant v of slice s is expert 4 v + s. A token uses 4 experts, about as many units as
the dense layer has; the most important units are in every slice. Routers start as clusters of the
tokens that a layer sees, the same row for the four slices of a variant, so the model starts as
the dense one, exactly. Two phases follow:

1. tied: the slices of a variant share a router row; variants grow apart on their clusters.
2. free: rows move one by one, slowly at first, and every combination of experts can be chosen.

Writes OUT_FOLDER/model (mixtral's layout, bfloat16), OUT_FOLDER/start (the dense model) and
OUT_FOLDER/training.json (settings, curve, loads). ``--experts 1`` trains the dense model the
same way. ROWS.npz comes from text_rows.py.
"""

import argparse
import dataclasses
import json
import math
import platform
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from mixture_torch import (
    Layer,
    Mixture,
    dense_model,
    expert_products_grouped,
    expert_products_loop,
    grow,
    read_packed,
    write_checkpoint,
)
from router_start import sample_tokens, start_routers, unit_orders
from text_rows import ROW_TOKENS, Rows
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_WARMUP, _FLOOR = 0.04, 0.05  # share of the time, share of the rate


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows on the device, and what is predicted behind which of their tokens."""

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    is_document: Tensor
    num_scored: int


@dataclasses.dataclass
class Machine:
    """How steps are computed; ``settle`` finds what works."""

    device: torch.device
    dtype: torch.dtype
    micro_rows: int
    chunk: int
    chunk_loss: Any = None


class RowStream:
    """Endless shuffled rows: documents once a pass, instructions ``repeats`` times."""

    def __init__(self, rows: Rows, repeats: int, held_back: int, seed: int) -> None:
        self._rows = rows
        generator = np.random.default_rng(seed)
        kinds = [np.flatnonzero(rows.is_document), np.flatnonzero(~rows.is_document)]
        held = [
            generator.choice(kind, min(held_back // 2, len(kind) // 4), False) for kind in kinds
        ]
        self.validation = np.concatenate(held)
        documents, answers = (
            np.setdiff1d(kind, part) for kind, part in zip(kinds, held, strict=True)
        )
        self._indices = np.concatenate([documents, *([answers] * repeats)])
        self._generator = generator

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from self._generator.permutation(self._indices).tolist()

    @property
    def rows_a_pass(self) -> int:
        """Rows until the documents come again."""
        return len(self._indices)

    def batch(self, indices: npt.NDArray[np.int64], machine: Machine) -> Batch:
        """Return rows as a batch."""
        tokens = self._rows.tokens[indices].astype(np.int64)
        is_target = self._rows.is_target[indices].copy()
        is_target[:, 0] = False
        row, column = np.nonzero(is_target)
        padded = -(-max(len(row), 1) // machine.chunk) * machine.chunk
        fill = (0, padded - len(row))
        spare = np.arange(fill[1]) % tokens.size  # of no weight; all at one place would be slow
        arrays = (
            tokens,
            np.concatenate([row * ROW_TOKENS + column - 1, spare]),
            np.pad(tokens[row, column], fill),
            np.pad(np.ones(len(row), np.float32), fill),
            np.pad(self._rows.is_document[indices][row].astype(np.float32), fill),
        )
        tensors = [torch.from_numpy(array) for array in arrays]
        if machine.device.type == "cuda":
            tensors = [
                tensor.pin_memory().to(machine.device, non_blocking=True) for tensor in tensors
            ]
        return Batch(*tensors, num_scored=len(row))


def chunk_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy of each of some tokens."""
    logits = F.linear(hidden, embedding.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none") * weights


def batch_loss(
    model: Mixture, batch: Batch, machine: Machine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return summed cross-entropy, that of documents alone, balance loss and statistics."""
    hidden, balance, statistics = model(batch.tokens, machine.dtype)
    scored = hidden.flatten(0, 1)[batch.positions]
    total = torch.zeros((), device=machine.device)
    documents = torch.zeros((), device=machine.device)
    for start in range(0, len(scored), machine.chunk):
        part = slice(start, start + machine.chunk)
        losses = checkpoint(
            machine.chunk_loss,
            scored[part],
            model.embedding,
            batch.targets[part],
            batch.weights[part],
            use_reentrant=False,
        )
        total = total + losses.sum()
        documents = documents + (losses.detach() * batch.is_document[part]).sum()
    return total, documents, balance, statistics


def settle(model: Mixture, stream: RowStream, machine: Machine, compiled: bool) -> str:
    """Find what works here: grouped products, compilation, rows at once; return it in words."""
    grouped = model.shape.experts > 1 and grouped_products_agree(machine)
    attempts = (
        [(True, grouped), (False, grouped), (False, False)] if compiled else [(False, grouped)]
    )
    indices = np.resize(stream.validation, machine.micro_rows)
    for is_compiled, is_grouped in attempts:
        Layer.grouped = is_grouped
        for layer in model.layers:
            layer._compiled_call_impl = None
            if is_compiled:
                layer.compile()
        machine.chunk_loss = torch.compile(chunk_loss) if is_compiled else chunk_loss
        while machine.micro_rows:
            try:
                batch = stream.batch(indices[: machine.micro_rows], machine)
                total, _, balance, _ = batch_loss(model, batch, machine)
                (total / batch.num_scored + balance).backward()
                model.zero_grad()
                names = [
                    "compiled" if is_compiled else "eager",
                    "grouped" if is_grouped else "loop",
                ]
                return f"{', '.join(names)}, {machine.micro_rows} rows at once"
            except torch.OutOfMemoryError:
                model.zero_grad()
                machine.micro_rows //= 2
                print(f"out of memory, {machine.micro_rows} rows at once", flush=True)
            except Exception:  # whatever a compiler or a kernel raises: the next attempt may work
                traceback.print_exc()
                model.zero_grad()
                break
    raise SystemExit("no way to compute a step works here")


def grouped_products_agree(machine: Machine) -> bool:
    """Whether grouped products exist and agree with the loop over experts, gradients too."""
    torch.manual_seed(0)
    sizes = torch.tensor([5, 0, 130, 61], device=machine.device)
    ends = sizes.cumsum(0).to(torch.int32)
    found = []
    try:
        for products in (expert_products_loop, expert_products_grouped):
            torch.manual_seed(0)
            shapes = ((196, 64), (4, 96, 64), (4, 64, 48))
            arrays = [torch.randn(shape, device=machine.device) * 0.2 for shape in shapes]
            arrays = [array.to(machine.dtype).requires_grad_() for array in arrays]
            out = products(*arrays, ends)
            (out.float() * torch.linspace(0, 1, 64, device=machine.device)).sum().backward()
            found.append([out.detach(), *(array.grad for array in arrays)])
    except Exception:  # not there, or not for this card
        traceback.print_exc()
        return False
    worst = max(
        ((a.float() - b.float()).abs().max() / a.float().abs().max()).item()
        for a, b in zip(*found, strict=True)
    )
    print(f"grouped products against the loop: relative difference {worst:.1e}", flush=True)
    return worst < 0.02


@torch.no_grad()
def validate(model: Mixture, stream: RowStream, machine: Machine) -> dict[str, float]:
    """Return cross-entropy on rows held back, by kind, and the mean number of distinct slices."""
    sums = np.zeros(4)
    distinct = []
    for start in range(0, len(stream.validation), machine.micro_rows):
        chosen = stream.validation[start : start + machine.micro_rows]
        batch = stream.batch(chosen, machine)
        total, documents, _, statistics = batch_loss(model, batch, machine)
        of_documents = float(batch.is_document.sum())
        sums += [
            float(documents),
            of_documents,
            float(total - documents),
            batch.num_scored - of_documents,
        ]
        distinct.append(float(statistics[:, -1].mean()))
    return {
        "documents": sums[0] / max(sums[1], 1),
        "answers": sums[2] / max(sums[3], 1),
        "distinct_slices": float(np.mean(distinct)),
    }


def make_optimizer(model: Mixture, arguments: argparse.Namespace) -> torch.optim.AdamW:
    """Return AdamW: down projections faster, routers slower, no decay on norms."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        rate, decay = 1.0, arguments.weight_decay
        if name.endswith("router"):
            rate, decay = arguments.router_rate, 0.0
        elif name.endswith("w2"):
            rate = math.sqrt(model.shape.slices)  # most of their columns are larger, by slices
        elif parameter.ndim == 1 or name == "embedding":
            decay = 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": decay / rate,
                "relative_rate": rate,
                "is_router": rate == arguments.router_rate,
            }
            for (rate, decay), parameters in groups.items()
        ],
        lr=arguments.rate,
        betas=(0.9, 0.95),
        fused=next(model.parameters()).device.type == "cuda",
    )


def rate_at(progress: float) -> float:
    """Return the share of the peak rate: a linear rise, then a cosine."""
    if progress < _WARMUP:
        return max(progress / _WARMUP, 0.02)
    turn = min((progress - _WARMUP) / (1 - _WARMUP), 1.0)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * turn))


def tie_router_gradients(model: Mixture) -> None:
    """Give the slices of a variant the same router gradient."""
    for layer in model.layers:
        grad = layer.router.grad
        if grad is not None:
            tied = grad.view(-1, model.shape.slices, grad.shape[-1])
            tied.copy_(tied.mean(1, keepdim=True).expand_as(tied))


class Training:
    """The loop, by the clock."""

    def __init__(
        self,
        model: Mixture,
        stream: RowStream,
        machine: Machine,
        arguments: argparse.Namespace,
        begin: float,
    ) -> None:
        self.model, self.stream, self.machine = model, stream, machine
        self.arguments = arguments
        self.optimizer = make_optimizer(model, arguments)
        self.curve: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.tokens = 0
        self.steps = 0
        self._begin, self._end = time.perf_counter(), begin + arguments.minutes * 60

    def run(self) -> None:
        """Train until the time is over."""
        rows = iter(self.stream)
        self._validate()
        self._begin = time.perf_counter()
        seconds = 0.0
        is_tied = self.model.shape.experts > 1
        while (now := time.perf_counter()) + 1.5 * seconds < self._end:
            if self.arguments.max_steps and self.steps >= self.arguments.max_steps:
                break
            progress = (now - self._begin) / (self._end - self._begin)
            if is_tied and progress >= self.arguments.tied:
                is_tied = False
                self._validate()
            self._step([next(rows) for _ in range(self.arguments.step_rows)], progress, is_tied)
            seconds = time.perf_counter() - now
        self._validate()

    def _step(self, indices: list[int], progress: float, is_tied: bool) -> None:
        start = time.perf_counter()
        size = self.machine.micro_rows
        batches = [
            self.stream.batch(np.array(indices[i : i + size]), self.machine)
            for i in range(0, len(indices), size)
        ]
        scored = sum(batch.num_scored for batch in batches)
        sums = torch.zeros(3, device=self.machine.device)
        statistics = torch.zeros((), device=self.machine.device)
        for batch in batches:
            total, documents, balance, numbers = batch_loss(self.model, batch, self.machine)
            (total / scored + self.arguments.balance * balance / len(batches)).backward()
            sums += torch.stack([total.detach(), documents, balance.detach() / len(batches)])
            statistics = statistics + numbers / len(batches)
        if is_tied:
            tie_router_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        share = rate_at(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.rate * share * group["relative_rate"]
            if group["is_router"] and not is_tied:  # experts need time to get used to others
                loosened = (progress - self.arguments.tied) / max(self.arguments.loosen, 1e-6)
                group["lr"] *= min(max(loosened, 0.0), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total_sum, document_sum, balance_mean = sums.tolist()
        of_documents = sum(float(batch.is_document.sum()) for batch in batches)
        self.tokens += len(indices) * ROW_TOKENS
        self.steps += 1
        seconds = time.perf_counter() - start
        point = {
            "step": self.steps,
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self._begin,
            "loss": total_sum / scored,
            "documents": document_sum / max(of_documents, 1),
            "answers": (total_sum - document_sum) / max(scored - of_documents, 1),
            "balance": balance_mean,
            "rate": self.arguments.rate * share,
            "gradient": float(norm),
            "distinct_slices": float(statistics[:, -1].mean()),
            "largest_load": float(statistics[:, :-1].max() * self.model.shape.experts),
            "smallest_load": float(statistics[:, :-1].min() * self.model.shape.experts),
            "tokens_a_second": len(indices) * ROW_TOKENS / seconds,
        }
        self.curve.append({key: float(f"{value:.6g}") for key, value in point.items()})
        if self.steps % self.arguments.log_every == 1 or self.arguments.log_every == 1:
            words = " ".join(f"{key}={value:.4g}" for key, value in point.items())
            print(words, flush=True)

    def _validate(self) -> None:
        found = validate(self.model, self.stream, self.machine)
        self.validations.append({"step": self.steps, **found})
        print("validation " + json.dumps(self.validations[-1]), flush=True)


def main() -> None:
    """Train as the command line says."""
    begin = time.perf_counter()
    arguments = _parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = Machine(device, dtype, arguments.micro_rows, arguments.chunk)
    torch.manual_seed(arguments.seed)
    rows = Rows.load(arguments.rows)
    stream = RowStream(rows, arguments.repeats, arguments.validation_rows, arguments.seed)
    weights, config = read_packed(arguments.source)
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = dense_model(weights, config).to(device)
    del weights
    if arguments.experts > 1:
        write_checkpoint(model, arguments.source, config, arguments.out / "start")
        sample = sample_tokens(rows, arguments.router_rows).to(device)
        orders = unit_orders(model, sample, dtype)
        model = grow(model, arguments.experts, arguments.slices, arguments.common, orders)
        model = model.to(device)
        start_routers(model, sample, dtype, arguments.router_scale)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    _say(begin, f"{millions:.0f} M parameters")
    way = settle(model, stream, machine, device.type == "cuda" and arguments.compile)
    _say(begin, way)
    training = Training(model, stream, machine, arguments, begin)
    training.run()
    _say(begin, f"{training.steps} steps, {training.tokens / 1e6:.1f} M tokens")
    write_checkpoint(model, arguments.source, config, arguments.out / "model")
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
    }
    report = {
        "settings": settings,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "way": way,
        "shape": dataclasses.asdict(model.shape),
        "rows_a_pass": stream.rows_a_pass,
        "steps": training.steps,
        "tokens": training.tokens,
        "validation": training.validations,
        "curve": training.curve,
    }
    (arguments.out / "training.json").write_text(json.dumps(report))
    _say(begin, "written")


def _say(begin: float, text: str) -> None:
    print(f"[{time.perf_counter() - begin:.0f} s] {text}", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="MLX checkpoint folder of a dense llama")
    parser.add_argument("rows", type=Path, help=".npz of text_rows.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=11.0, help="from start to end of training")
    parser.add_argument("--experts", type=int, default=32, help="a layer; 1 trains the dense model")
    parser.add_argument("--slices", type=int, default=4, help="of a dense layer; also top-k")
    parser.add_argument("--common", type=int, default=64, help="units in every slice")
    parser.add_argument("--step-rows", type=int, default=64, help="of 1024 tokens a step")
    parser.add_argument("--micro-rows", type=int, default=32, help="at once; halved if too many")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens whose logits exist at once")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--router-rate", type=float, default=0.2, help="relative")
    parser.add_argument("--router-scale", type=float, default=4.0, help="deviation of first logits")
    parser.add_argument("--router-rows", type=int, default=64, help="rows that are clustered")
    parser.add_argument("--tied", type=float, default=0.35, help="share of the time")
    parser.add_argument("--loosen", type=float, default=0.2, help="then routers speed up for that")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=2, help="of instructions in one pass")
    parser.add_argument("--validation-rows", type=int, default=64, help="held back")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--max-steps", type=int, default=0, help="for tests")
    parser.add_argument("--layers", type=int, default=0, help="for tests: only the first ones")
    return parser.parse_args()


if __name__ == "__main__":
    main()

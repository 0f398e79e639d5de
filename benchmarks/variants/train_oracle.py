"""Does a layer gain from variants of its FFN, if the text's domain chooses them?

    PYTHONPATH=benchmarks/mixture python train_oracle.py SMOLLM2_FOLDER \
        ROWS.npz HELD_OUT.npz OUT.json

Trains the dense model and models with R variants of every feed-forward layer, all on the same
batches in the same order, and scores held-out text with each. The domain's label chooses the
variant: what a predictor could gain at most. Domains are dealt into R equal groups of similar ones.
The rows come from oracle_rows.py. OUT.json is rewritten after every row.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mixture_torch import Mixture, dense_model, read_packed
from oracle_rows import take_rows
from text_rows import ROW_TOKENS, Rows
from train_mixture import rate_at
from variants_torch import Scored, VariantModel, example_losses, summed_loss

_FEATURE_ROWS = 8  # a domain, to tell which domains are similar
_RESTARTS = 20
_SAME = 1e-3  # nats an example; 0 is expected, other kernels may round otherwise


@torch.no_grad()
def domain_features(model: VariantModel, rows: Rows, dtype: torch.dtype) -> npt.NDArray[Any]:
    """Return (N, D): the mean input of the middle layer's FFN over a domain's first rows."""
    features = []
    middle = model.shape.layers // 2
    for domain in range(len(rows.names)):
        own = rows.tokens[np.flatnonzero(rows.domains == domain)[:_FEATURE_ROWS]]
        tokens = torch.from_numpy(own.astype(np.int64)).to(model.embedding.device)
        x, cos, sin = model.embed(tokens, dtype)
        for layer in model.layers[:middle]:
            x = layer(x, cos, sin, 0)
        layer = model.layers[middle]
        seen = layer.post_norm(layer.attend(x, cos, sin))[tokens != 0]  # 0 pads
        features.append(seen.float().mean(0).cpu().numpy())
    return np.stack(features)


def balanced_groups(features: npt.NDArray[Any], num_groups: int, seed: int) -> npt.NDArray[Any]:
    """Return (N,) groups of equal size: least squares within groups, found by swaps.

    Raises:
        ValueError: if the N domains cannot be dealt evenly.
    """
    count = len(features)
    if count % num_groups:
        raise ValueError(f"{count} domains cannot be dealt into {num_groups} groups of equal size")
    distances = np.square(features[:, None] - features[None]).sum(-1)
    generator = np.random.default_rng(seed)

    def spread(groups: npt.NDArray[Any]) -> float:
        return float(distances[groups[:, None] == groups].sum())

    found = []
    for _ in range(_RESTARTS):
        groups = generator.permutation(np.arange(count) % num_groups)
        least, before = spread(groups), np.inf
        while least < before:
            before = least
            for one, other in zip(*np.triu_indices(count, 1), strict=True):
                groups[[one, other]] = groups[[other, one]]
                if (now := spread(groups)) < least:
                    least = now
                else:
                    groups[[one, other]] = groups[[other, one]]
        found.append((least, groups.tolist()))
    best = min(found)[1]
    order = list(dict.fromkeys(best))  # groups are numbered by their first domain
    return np.array([order.index(group) for group in best])


def training_order(domains: npt.NDArray[Any], num_rounds: int, seed: int) -> npt.NDArray[np.int64]:
    """Return (num_rounds, N) indices of rows: a round holds one of each domain."""
    generator = np.random.default_rng(seed)
    columns = []
    for domain in range(int(domains.max()) + 1):
        own = np.flatnonzero(domains == domain)
        passes = [generator.permutation(own) for _ in range(-(-num_rounds // len(own)))]
        columns.append(np.concatenate(passes)[:num_rounds])
    return np.stack(columns, axis=1)


def train(
    model: VariantModel,
    rows: Rows,
    order: npt.NDArray[np.int64],
    groups: npt.NDArray[Any],
    dtype: torch.dtype,
    arguments: argparse.Namespace,
) -> list[float]:
    """Train on ``order``, ``step_rounds`` rounds a step; return each step's loss in nats a token.

    The loss is the mean over all scored tokens of a step, whatever group they are of.
    """
    device = model.embedding.device
    if arguments.compile:
        torch.compiler.reset()
        for layer in model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    by_group = np.argsort(groups, kind="stable")
    losses = []
    num_steps = len(order) // arguments.step_rounds
    for step in range(num_steps):
        start = step * arguments.step_rounds
        rounds = order[start : start + arguments.step_rounds, by_group]
        scored = int(rows.is_target[rounds.flatten()][:, 1:].sum())
        total = torch.zeros((), device=device)
        for first in range(0, len(rounds), arguments.micro_rounds):
            part = rounds[first : first + arguments.micro_rounds]
            batch = Scored.of(rows, part.T.flatten(), device)
            loss = summed_loss(model, batch, dtype, arguments.chunk) / scored
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate_at((step + 0.5) / num_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)  # read at the end: the device need not wait
        if step % 20 == 0 or step == num_steps - 1:
            print(f"  step {step + 1}/{num_steps} loss {float(total):.4f}", flush=True)
    return [float(loss) for loss in losses]


class Oracle:
    """The rows of the table, one after the other."""

    def __init__(
        self, dense: Mixture, rows: Rows, held_out: Rows, arguments: argparse.Namespace
    ) -> None:
        self.rows, self.held_out, self.arguments = rows, held_out, arguments
        self._dense = dense
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        names = rows.names
        num_steps = arguments.tokens // (len(names) * ROW_TOKENS * arguments.step_rounds)
        if num_steps < 1:
            raise SystemExit(f"--tokens {arguments.tokens} is less than one step")
        num_rounds = num_steps * arguments.step_rounds
        self._order = training_order(rows.domains, num_rounds, arguments.seed)
        start = self._grown(1)
        self._features = domain_features(start, rows, self._dtype)
        unseen = domain_features(start, held_out, self._dtype)
        self._read_as: dict[str, str] = {}  # without training text: as the nearest of its kind
        for name, own in zip(held_out.names, unseen, strict=True):
            distances = np.square(self._features - own).sum(1)
            kind = [n for n in range(len(names)) if _is_document(names[n]) == _is_document(name)]
            nearest = names[min(kind, key=distances.__getitem__)]
            self._read_as[name] = name if name in names else nearest
        _, first = np.unique(held_out.domains, return_index=True)
        self._sample = take_rows(held_out, first)
        zeros = dict.fromkeys(held_out.names, 0)
        self._sample_losses = self._losses(start, self._sample, zeros)
        is_cuda = self._device.type == "cuda"
        self.report: dict[str, Any] = {
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in vars(arguments).items()
            },
            "machine": torch.cuda.get_device_name() if is_cuda else platform.machine(),
            "torch": torch.__version__,
            "tokens": self._order.size * ROW_TOKENS,
            "shape": dataclasses.asdict(dense.shape),
            "trained_domains": list(names),
            "read_as": self._read_as,
            "scored_tokens": {
                name: held_out.is_target[held_out.domains == domain].sum(1).tolist()
                for domain, name in enumerate(held_out.names)
            },
            "groups": {},
            "training": {},
            "left_out": [],
            "passes": {"before": self._losses(start, held_out, zeros)},
        }

    def run(self, num_variants: int) -> None:
        """Train and score the model of R variants; with 1, the dense one."""
        begin = time.perf_counter()
        gc.collect()  # the last row's layers refer to themselves once they are compiled
        names = self.rows.names
        groups = balanced_groups(self._features, num_variants, self.arguments.seed)
        dealt = dict(zip(names, groups.tolist(), strict=True))
        chosen = {name: dealt[trained] for name, trained in self._read_as.items()}
        model = self._grown(num_variants)
        start_difference = max(
            abs(one - other)
            for name, nats in self._losses(model, self._sample, chosen).items()
            for one, other in zip(nats, self._sample_losses[name], strict=True)
        )
        if start_difference > _SAME:
            raise SystemExit(f"{num_variants} variants start {start_difference} nats off the dense")
        label = "dense" if num_variants == 1 else f"oracle {num_variants}"
        print(label, dealt, flush=True)
        ready = time.perf_counter()
        losses = train(model, self.rows, self._order, groups, self._dtype, self.arguments)
        trained = time.perf_counter()
        passes = self.report["passes"]
        passes[label] = self._losses(model, self.held_out, chosen)
        if num_variants > 1:
            others = {name: (group + 1) % num_variants for name, group in chosen.items()}
            passes[f"shuffled {num_variants}"] = self._losses(model, self.held_out, others)
        seconds = [ready - begin, trained - ready, time.perf_counter() - trained]
        self.report["groups"][label] = dealt
        self.report["training"][label] = {
            "losses": [float(f"{loss:.6g}") for loss in losses],
            "start_difference": start_difference,
            "tokens_a_second": self.report["tokens"] / seconds[1],
            "seconds": dict(zip(("preparing", "training", "scoring"), seconds, strict=True)),
        }
        print(label, json.dumps(self.report["training"][label]["seconds"]), flush=True)

    def _grown(self, num_variants: int) -> VariantModel:
        return VariantModel.grown(self._dense, num_variants).to(self._device)

    def _losses(
        self, model: VariantModel, rows: Rows, groups: dict[str, int]
    ) -> dict[str, list[float]]:
        return example_losses(model, rows, groups, self._dtype, self.arguments.chunk)


def _is_document(name: str) -> bool:
    return name.startswith("lm_")


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report, whole or not at all."""
    staging = path.with_name(path.name + ".part")
    staging.write_text(json.dumps(report))
    os.replace(staging, path)


def main() -> None:
    """Train and score what the command line names."""
    begin = time.perf_counter()
    arguments = _parse_arguments()
    torch._dynamo.config.suppress_errors = True  # what does not compile runs without
    rows, held_out = Rows.load(arguments.rows), Rows.load(arguments.held_out)
    weights, config = read_packed(arguments.source)
    oracle = Oracle(dense_model(weights, config), rows, held_out, arguments)
    write_report(oracle.report, arguments.out)
    slowest = 0.0
    for num_variants in arguments.variants:
        start = time.perf_counter()
        if start - begin + slowest > arguments.seconds:
            oracle.report["left_out"].append(num_variants)
            print(f"{num_variants} variants: no time left", flush=True)
        else:
            oracle.run(num_variants)
            slowest = max(slowest, time.perf_counter() - start)
        write_report(oracle.report, arguments.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="MLX checkpoint folder of a dense llama")
    parser.add_argument("rows", type=Path, help=".npz of oracle_rows.py: text to train on")
    parser.add_argument("held_out", type=Path, help=".npz of oracle_rows.py: examples to score")
    parser.add_argument("out", type=Path, help="the .json to write")
    parser.add_argument(
        "--variants", type=int, nargs="+", default=[1, 4, 16, 2, 8], help="R of each row"
    )
    parser.add_argument("--tokens", type=int, default=8_000_000, help="to train each row on")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak")
    parser.add_argument("--step-rounds", type=int, default=2, help="rows of each domain a step")
    parser.add_argument("--micro-rounds", type=int, default=2, help="of them at once")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens whose logits exist at once")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row that ends later")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

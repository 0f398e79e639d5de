"""The oracle test of benchmarks/variants on a tiny model: where it starts, and what it measures."""

import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from text_rows import ROW_TOKENS, Rows
from tokenizers import Tokenizer, models, pre_tokenizers

torch = pytest.importorskip("torch", reason="variants are trained with PyTorch")

import summarise_oracle  # noqa: E402
import train_oracle  # noqa: E402
from mixture_torch import Mixture, dense_model, read_packed  # noqa: E402
from oracle_rows import held_out_rows, training_rows  # noqa: E402
from train_oracle import balanced_groups, training_order  # noqa: E402
from variants_torch import Scored, VariantModel, example_losses, summed_loss  # noqa: E402

pytestmark = pytest.mark.parity

NAMES = ("math", "sql", "lm_novels", "lm_code")
CPU = torch.device("cpu")
CHUNK = 50


def make_rows(rows_a_domain: int, seed: int = 0) -> Rows:
    """Rows whose domains use different tokens, so that there is something to learn for each."""
    generator = np.random.default_rng(seed)
    domains = np.repeat(np.arange(len(NAMES)), rows_a_domain)
    tokens = generator.integers(3, 14, (len(domains), 40)) + 13 * domains[:, None]
    is_target = np.ones(tokens.shape, np.bool_)
    is_target[:, :5] = False
    is_document = np.array([NAMES[domain].startswith("lm_") for domain in domains])
    return Rows(tokens.astype(np.uint16), is_target, domains.astype(np.int16), is_document, NAMES)


@pytest.fixture
def source(
    tiny_model: Callable[..., nn.Module],
    tiny_config: Callable[..., dict[str, object]],
    tmp_path: Path,
) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    tiny_model("llama").save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(tiny_config("llama")))
    return folder


@pytest.fixture
def dense(source: Path) -> Mixture:
    return dense_model(*read_packed(source))


def test_every_variant_starts_as_the_dense_model(dense: Mixture) -> None:
    rows = make_rows(3)
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    with torch.no_grad():
        expected = dense(tokens, torch.float32)[0]
        found = VariantModel.grown(dense, 4)(tokens, torch.float32)
    assert float((found - expected).abs().max()) < 1e-4
    start = example_losses(
        VariantModel.grown(dense, 1), rows, dict.fromkeys(NAMES, 0), torch.float32, CHUNK
    )
    grown = VariantModel.grown(dense, 4)
    for group in range(4):
        chosen = dict.fromkeys(NAMES, group)
        assert example_losses(grown, rows, chosen, torch.float32, CHUNK) == start


def test_a_group_is_read_and_trained_by_its_own_variant_alone(dense: Mixture) -> None:
    rows = make_rows(2)
    model = VariantModel.grown(dense, 2)
    layers: Any = model.layers
    with torch.no_grad():
        for layer in layers:
            layer.w2[1] *= 2
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    together = model(tokens, torch.float32)
    for group in range(2):
        alone = model(tokens[4 * group : 4 * group + 4], torch.float32, group)
        torch.testing.assert_close(together[4 * group : 4 * group + 4], alone)
    together[:4].sum().backward()
    for layer in layers:
        assert float(layer.w13.grad[0].abs().max()) > 0 == float(layer.w13.grad[1].abs().max())


def test_gradients_of_the_variants_add_up_to_the_dense_one(dense: Mixture) -> None:
    rows = make_rows(2)
    batch = Scored.of(rows, np.arange(8), CPU)
    gradients = []
    for num_variants in (1, 4):
        model = VariantModel.grown(dense, num_variants)
        loss = summed_loss(model, batch, torch.float32, CHUNK)
        loss.backward()
        layer: Any = model.layers[1]
        gradients.append((loss.detach(), layer.w13.grad.sum(0), layer.w2.grad.sum(0), layer.o.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_similar_domains_share_a_group() -> None:
    features = np.array([[0.0, 9], [5, 1], [0, 8], [5, 0], [-4, 0], [-4, 1]])
    groups = balanced_groups(features, 3, seed=0)
    assert groups.tolist() == [0, 1, 0, 1, 2, 2]
    assert sorted(balanced_groups(features, 6, seed=0)) == list(range(6))
    assert set(balanced_groups(features, 1, seed=0)) == {0}
    with pytest.raises(ValueError, match="6 domains cannot be dealt into 4 groups"):
        balanced_groups(features, 4, seed=0)


def test_a_round_holds_a_row_of_each_domain() -> None:
    domains = np.array([0] * 5 + [1] * 2)
    order = training_order(domains, 4, seed=0)
    assert (domains[order] == [0, 1]).all()
    assert len(set(order[:, 0].tolist())) == 4
    assert sorted(order[:, 1].tolist()) == [5, 5, 6, 6]


def test_rows_train_and_are_compared(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_rows(20).save(tmp_path / "rows.npz")
    held_out = make_rows(3, seed=1)
    renamed = Rows(
        held_out.tokens,
        held_out.is_target,
        held_out.domains,
        held_out.is_document,
        ("reasoning", *NAMES[1:]),
    )
    renamed.save(tmp_path / "held_out.npz")
    out = tmp_path / "oracle.json"
    tokens = str(30 * 2 * len(NAMES) * ROW_TOKENS)
    files = [str(tmp_path / name) for name in ("llama", "rows.npz", "held_out.npz", "oracle.json")]
    options = ["--variants", "1", "4", "2", "--tokens", tokens, "--rate", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["train_oracle.py", *files, *options])
    train_oracle.main()
    report = json.loads(out.read_text())
    passes = report["passes"]
    assert list(passes) == ["before", "dense", "oracle 4", "shuffled 4", "oracle 2", "shuffled 2"]
    first = [report["training"][label]["losses"][0] for label in ("dense", "oracle 4", "oracle 2")]
    assert first == pytest.approx([first[0]] * 3, abs=1e-4)
    for row in report["training"].values():
        assert row["start_difference"] == 0
        assert len(row["losses"]) == 30
        assert row["losses"][-1] < row["losses"][0] - 0.3
    totals = {name: sum(map(sum, of.values())) for name, of in passes.items()}
    assert totals["oracle 4"] < totals["dense"] < totals["before"]
    assert totals["oracle 4"] < totals["shuffled 4"]
    assert report["read_as"]["reasoning"] in ("math", "sql")
    monkeypatch.setattr(sys, "argv", ["summarise_oracle.py", str(out)])
    capsys.readouterr()
    summarise_oracle.main()
    assert "| oracle 4 |" in capsys.readouterr().out


def test_a_row_that_would_end_too_late_is_not_started(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rows.npz", "held_out.npz"):
        make_rows(2).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("llama", "rows.npz", "held_out.npz", "oracle.json")]
    options = ["--tokens", str(2 * len(NAMES) * ROW_TOKENS), "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["train_oracle.py", *files, *options])
    train_oracle.main()
    report = json.loads((tmp_path / "oracle.json").read_text())
    assert report["left_out"] == [1, 4, 16, 2, 8]
    assert list(report["passes"]) == ["before"]


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "\n".join(map(json.dumps, records)).encode()
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)


def test_training_rows_hold_one_domain_each(tmp_path: Path) -> None:
    words = {"[UNK]": 3, "a": 10, "b": 20, "c": 30}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, word in (("math", "a"), ("sql", "b")):
        records = [{"prompt": word, "response": f"{word} " * 300} for _ in range(9)]
        write_records(tmp_path / f"sft/{name}.jsonl.xz", records)
    write_records(tmp_path / "pretrain/novels.jsonl.xz", [{"text": "c " * 5000}])
    write_records(tmp_path / "eval/math.jsonl", [{"prompt": "a", "response": "a a"}] * 3)
    write_records(tmp_path / "eval/lm_novels.jsonl", [{"text": "c " * 5000}])
    rows = training_rows(tmp_path, tokenizer, rows_a_domain=2)
    assert rows.names == ("math", "sql", "lm_novels")
    assert rows.domains.tolist() == [0, 0, 1, 1, 2, 2]
    for own, target, domain in zip(rows.tokens, rows.is_target, rows.domains, strict=True):
        assert set(own[target]) <= {2, (10, 20, 30)[domain]}
    held_out = held_out_rows(tmp_path, tokenizer, examples=2)
    assert held_out.names == ("lm_novels", "math")
    assert held_out.is_target.sum(1).tolist() == [1023, 3, 3]  # an answer's end is scored too

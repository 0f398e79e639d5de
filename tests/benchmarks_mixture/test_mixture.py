"""The scripts of benchmarks/mixture on tiny models: what is measured, and what is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from evidence import Evidence, Examples
from expert_products import choose_products, product_error, with_all_experts, with_zero_slots
from measure_mixture import Measurement, losses, plan, slices_against_masks
from summarise_mixture import DIFFERENCES, Results, compact, pass_name

from ifp_mlx.evaluation.quality import HeldOutExample
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.slicing.compact import slice_model
from ifp_mlx.storage.weights import load_model

ModelFactory = Callable[..., nn.Module]
DOMAINS = ("lm_novels", "math", "sql")
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35, 8]])


def random_ids(seed: int, count: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, 60, (count, 12)).tolist()  # type: ignore[no-any-return]


@pytest.fixture
def texts() -> dict[str, list[HeldOutExample]]:
    return {
        domain: [HeldOutExample(tuple(ids), 5, domain) for ids in random_ids(seed, 2)]
        for seed, domain in enumerate(DOMAINS)
    }


def test_every_pass_is_measured(
    tiny_model: ModelFactory, tmp_path: Path, texts: dict[str, list[HeldOutExample]]
) -> None:
    model = tiny_model("mixtral")
    examples = {
        domain: Examples(random_ids(seed, 9), random_ids(seed + 9, 9))
        for seed, domain in enumerate(DOMAINS[:2])
    }
    descriptions = {domain: ids for domain, ids in zip(DOMAINS, random_ids(20, 3), strict=True)}
    evidence = Evidence(model, examples, descriptions)
    passes = plan([4], 4, evidence.domains)
    out = tmp_path / "mixture.json"
    measurement = Measurement(model, texts, out, minutes=1, drift_texts=1)
    measurement.run(evidence, passes)
    report = json.loads(out.read_text())
    names = {one.name for one in passes}
    assert names == set(report["passes"]) | set(report["drift"])
    assert set(report["passes"]["description@4/sliced/0"]) == set(DOMAINS)
    assert set(report["passes"]["requests8@4/sliced/0"]) == set(DOMAINS[:2])
    assert set(report["drift"]["task64@4"]["math"]) == set(DOMAINS)
    assert evidence.routing_figures()["usage_entropy"]
    assert_compact_says_the_same(
        report | {"model": {"experts": 8}, "selecting_domains": evidence.domains}
    )


def assert_compact_says_the_same(report: dict[str, object]) -> None:
    small = json.loads(json.dumps(compact(report)))
    whole, left = Results(report), Results(small)
    assert set(left.names) == set(whole.names)
    for name in whole.names:
        assert left.mean(name) == pytest.approx(whole.mean(name), rel=2e-3)
    compared = 0
    for _, one, other in DIFFERENCES:
        for num_kept in whole.amounts:
            names = [pass_name(row, num_kept) for row in (one, other) if row is not None]
            if len(names) == 2:
                gap = whole.difference(*names)
                assert left.difference(*names) == pytest.approx(gap, abs=0.01)
                compared += gap is not None
    assert compared >= 5


def test_a_run_out_of_time_says_what_it_left_out(
    tiny_model: ModelFactory, tmp_path: Path, texts: dict[str, list[HeldOutExample]]
) -> None:
    model = tiny_model("mixtral")
    evidence = Evidence(model, {"math": Examples(random_ids(0, 2), random_ids(1, 2))}, {})
    measurement = Measurement(model, texts, tmp_path / "mixture.json", minutes=0, drift_texts=1)
    passes = plan([4], 4, evidence.domains)
    measurement.run(evidence, passes)
    assert measurement.report["left_out"] == [one.name for one in passes]


def test_all_experts_give_what_gathered_ones_give(tiny_model: ModelFactory) -> None:
    model = tiny_model("mixtral")
    computed = with_all_experts(model)
    np.testing.assert_allclose(computed(TOKENS), model(TOKENS), atol=1e-4)
    selection = select_random(model, 4)
    np.testing.assert_allclose(
        slice_model(computed, selection)(TOKENS), slice_model(model, selection)(TOKENS), atol=1e-4
    )
    assert product_error(model) < 1e-5
    assert product_error(computed) < 1e-5


def test_wrong_products_are_not_used(tiny_model: ModelFactory) -> None:
    model = tiny_model("mixtral")
    stacks = model.layers[0].block_sparse_moe.switch_mlp

    class Wrong(type(stacks)):  # type: ignore[misc]
        def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
            outputs: mx.array = super().__call__(x, experts)
            return -outputs

    stacks.__class__ = Wrong
    chosen, found = choose_products(model, lambda one: mx.eval(one(TOKENS)))
    assert list(found["seconds"]) == ["all"]
    assert chosen is not model


def test_zero_slots(tiny_model: ModelFactory) -> None:
    model = tiny_model("mixtral")
    whole = select_random(model, 8)
    assert mx.array_equal(with_zero_slots(model, whole)(TOKENS), model(TOKENS))
    half = select_random(model, 4)
    empty, sliced = with_zero_slots(model, half)(TOKENS), slice_model(model, half)(TOKENS)
    assert mx.abs(empty - sliced).max().item() > 1e-2  # type: ignore[operator]
    block = model.layers[0].block_sparse_moe
    x = mx.random.normal((1, 5, 32))
    logits = block.gate(x)
    chosen = mx.argsort(-logits, axis=-1)[..., :2]
    gates = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
    gates = gates * half.pick.mask()[0][chosen]
    expected = (block.switch_mlp(x, chosen) * gates[..., None]).sum(axis=-2)
    found = with_zero_slots(model, half).layers[0].block_sparse_moe(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_slices_are_masks(tiny_model: ModelFactory) -> None:
    difference = slices_against_masks(tiny_model("mixtral"), TOKENS)
    assert difference["slice_against_mask"] < 1e-4 < difference["slice_against_whole"]


def test_losses_belong_to_their_texts(
    tiny_model: ModelFactory, texts: dict[str, list[HeldOutExample]]
) -> None:
    model = tiny_model("mixtral")
    together = losses(model, texts)
    alone = losses(model, {"sql": texts["sql"][1:]})
    assert together["sql"][1] == pytest.approx(alone["sql"][0], abs=2e-3)


@pytest.mark.parity
def test_a_grown_mixture_starts_as_the_dense_model(
    tiny_model: ModelFactory, tiny_config: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the mixture is trained with PyTorch")
    from mixture_torch import dense_model, grow, read_packed, write_checkpoint
    from router_start import start_routers, unit_orders

    source = tmp_path / "llama"
    source.mkdir()
    dense_mlx = tiny_model("llama")
    dense_mlx.save_weights(str(source / "model.safetensors"))
    (source / "config.json").write_text(json.dumps(tiny_config("llama")))
    weights, config = read_packed(source)
    dense = dense_model(weights, config)
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (9, 24))
    mixture = grow(dense, 16, 4, 64, unit_orders(dense, ids, torch.float32))
    start_routers(mixture, ids, torch.float32, 4.0)
    with torch.no_grad():
        expected = dense(ids, torch.float32)[0]
        hidden, _, statistics = mixture(ids, torch.float32)
    assert float((hidden - expected).abs().max()) < 1e-4
    assert float(statistics[:, -1].min()) == 4.0  # every token sees each slice once
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
            parameter.copy_(parameter.bfloat16().float())
        hidden = mixture(ids, torch.float32)[0]
    write_checkpoint(mixture, source, config, tmp_path / "mixture")
    loaded, _ = load_model(tmp_path / "mixture", mx.float32)
    difference = mx.abs(loaded.model(mx.array(ids.numpy())) - mx.array(hidden.numpy()))
    assert difference.max().item() < 1e-3  # type: ignore[operator]

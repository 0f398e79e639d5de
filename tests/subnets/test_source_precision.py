"""No sub-network, stored model or export takes more than what it was cut from."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ifp_mlx.adapters.adapter import load_adapter, save_adapter
from ifp_mlx.assistant import Assistant
from ifp_mlx.convert.quantize import make_quantization, quantize_checkpoint
from ifp_mlx.selection.predictor import PredictorHead
from ifp_mlx.selection.selectors import select_random
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import CutOptions, slice_model
from ifp_mlx.slicing.forms import as_computed, in_types_of
from ifp_mlx.slicing.repacking import Repacking, RequantizationError, repacking_for
from ifp_mlx.slicing.streaming import load_subnetwork
from ifp_mlx.slicing.whole_down import WholeDown
from ifp_mlx.storage import weights
from ifp_mlx.storage.weights import load_model
from ifp_mlx.subnets.task_cache import TaskCache
from ifp_mlx.units.changed_linear import ChangedLinear
from ifp_mlx.units.modules import is_packed, leaf_modules, named_arrays, stored_bytes

CheckpointFactory = Callable[..., Path]
TASK = "help me write Python"
TOKENS = mx.array([[3, 14, 15, 9, 26]])
SIZES = {"hidden_size": 64, "intermediate_size": 320}


@pytest.fixture
def plain(tiny_checkpoint: CheckpointFactory) -> Path:
    """A checkpoint of 16 bits."""
    path = tiny_checkpoint(**SIZES)
    arrays = {name: a.astype(mx.bfloat16) for name, a in named_arrays(load_model(path)[0]).items()}
    mx.save_safetensors(str(path / "model.safetensors"), arrays, {"format": "mlx"})
    return path


@pytest.fixture
def packed(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A checkpoint of 4 bits."""
    quantization = make_quantization(bits=4, group_size=32)
    source = tiny_checkpoint(**SIZES)
    return quantize_checkpoint(source, tmp_path / "packed", quantization).path


def write_adapter(path: Path, keep_units: int = 160) -> Path:
    """Write an adapter that changes FFN and attention weights, with a predictor."""
    base = as_computed(load_model(path)[0], mx.float32)
    keys = iter(mx.random.split(mx.random.key(4), 64))
    changed = {
        name: array + 0.02 * mx.random.normal(array.shape, key=next(keys))
        for name, array in dict(tree_flatten(base.parameters())).items()
        if ".layers." in name and array.ndim == 2
    }
    head = PredictorHead(2 * 64, mx.random.normal((3, 320)), rank=4)
    manifest = {"base_model": "org/tiny", "keep_units": [keep_units]}
    save_adapter(path / "ifp" / "adapter", base, changed, head, manifest)
    return path / "ifp" / "adapter"


def source_bytes(path: Path) -> int:
    return stored_bytes(load_model(path, lazy=True)[0])


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def ask(path: Path, cache: TaskCache, task: str = TASK, **options: object) -> nn.Module:
    assistant = Assistant.load(path, cache=cache, preload=False, **options)  # type: ignore[arg-type]
    return assistant.subnetwork_for_task(task, 160).model


@pytest.mark.parametrize("kept", [160, 288])
def test_what_an_adapter_changed_is_packed_again_and_no_larger(packed: Path, kept: int) -> None:
    adapter = load_adapter(write_adapter(packed))
    stored = load_model(packed)[0]
    changed = adapter.apply(stored)
    assert isinstance(changed.layers[0].self_attn.q_proj, ChangedLinear)
    assert stored_bytes(changed) > 2 * stored_bytes(stored)
    selection = select_random(stored, kept)
    options = CutOptions(as_stored=True)
    loaded = load_subnetwork(packed, selection, options=options, adapt=adapter.apply)
    assert stored_bytes(loaded.model) <= stored_bytes(stored)
    assert all(
        is_packed(module) for _, module in leaf_modules(loaded.model) if "weight" in module
        and module.weight.ndim == 2
    )  # fmt: skip
    exact = slice_model(changed, selection, CutOptions(exact_down=True))
    dense = dict(named_arrays(as_computed(loaded.model, mx.float32)))
    squares = np.zeros(2)
    for name, array in named_arrays(exact).items():
        if ".layers." in name and array.ndim == 2:
            difference = np.array(dense[name]) - np.array(array)
            squares += (difference**2).sum(), (np.array(array) ** 2).sum()
    assert loaded.requantization_error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-3)


def test_fewer_bits_are_taken_only_where_the_source_would_be_outgrown(packed: Path) -> None:
    stored = load_model(packed)[0]
    assert repacking_for(stored, 160) == Repacking()
    assert repacking_for(stored, 288).bits < 8
    assert repacking_for(load_model(packed)[0], 32).bits == 8
    for kept in (64, 160, 224, 288):
        repacking, error = repacking_for(stored, kept), RequantizationError()
        options = CutOptions(as_stored=True)
        compact = slice_model(stored, select_random(stored, kept), options, error)
        assert compact.layers[0].mlp.down_proj.bits == repacking.bits
        assert stored_bytes(compact) <= stored_bytes(stored)
        assert 0 < error.relative < {8: 0.01, 6: 0.04, 5: 0.08, 4: 0.2}[repacking.bits]


def test_where_8_bits_would_outgrow_the_source_down_stays_whole(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed with, not written: exact, and no larger either."""
    monkeypatch.setattr(weights, "automatic_dtype", lambda model: None)  # as on a GPU
    assistant = Assistant.load(packed, selector=SelectorSpec("random"))
    subnet = assistant.subnetwork_for_task(TASK, 288)
    assert isinstance(subnet.model.layers[0].mlp.down_proj, WholeDown)
    assert subnet.requantization_error == 0
    assert subnet.size.num_bytes <= source_bytes(packed)
    predicted = assistant.predict_memory(288).weights_bytes
    assert predicted == pytest.approx(subnet.size.num_bytes, rel=0.01)


@pytest.mark.parametrize("computed", ["float32", "stored"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("source", ["plain", "packed"])
def test_stored_models_take_no_more_than_the_source(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    source: str,
    adapted: bool,
    computed: str,
) -> None:
    path = request.getfixturevalue(source)
    if adapted:
        write_adapter(path)
    if computed == "stored":
        monkeypatch.setattr(weights, "automatic_dtype", lambda model: None)
    cache = TaskCache(tmp_path / "cache")
    tasks = (TASK, "tell me a story", "write SQL")
    answers = [ask(path, cache, task)(TOKENS) for task in tasks]
    limit = source_bytes(path) * (1 + 3 * 160 / 320) + 50_000  # headers and selections
    assert folder_bytes(cache.folder) <= limit
    for task, answer in zip(tasks, answers, strict=True):  # from the disk, if it is there
        assert mx.array_equal(ask(path, cache, task)(TOKENS), answer)
    is_stored = any(cache.compact_folder.glob("*/*"))
    # Computed unpacked and not changed, units are read exactly from the checkpoint itself.
    assert is_stored == (adapted or source == "plain" or computed == "stored")


def test_tasks_from_the_disk_share_what_they_have_in_common(plain: Path, tmp_path: Path) -> None:
    cache = TaskCache(tmp_path / "cache")
    for task in (TASK, "tell me a story"):
        ask(plain, cache, task)
    assistant = Assistant.load(plain, cache=cache, preload=False)
    subnets = [assistant.subnetwork_for_task(t, 160) for t in (TASK, "tell me a story")]
    one, other = (subnet.model for subnet in subnets)
    assert all(subnet.weights_from_disk for subnet in subnets)
    assert one.layers[0].self_attn.q_proj.weight is other.layers[0].self_attn.q_proj.weight
    assert one.layers[0].mlp.up_proj.weight is not other.layers[0].mlp.up_proj.weight
    assert one.layers[0].self_attn.q_proj.weight.dtype == mx.float32


def test_a_prompt_s_own_sub_network_is_not_rounded_on_a_cpu(packed: Path) -> None:
    adapter = load_adapter(write_adapter(packed))
    assistant = Assistant.load(packed)
    subnet = assistant.subnetwork_for_prompt("Go", 160)
    assert subnet.selection is not None
    changed = adapter.apply(load_model(packed)[0])
    exact = slice_model(changed, subnet.selection, CutOptions(exact_down=True))
    expected = as_computed(exact, mx.float32)(TOKENS)
    assert mx.allclose(subnet.model(TOKENS), expected, atol=1e-5)
    assert subnet.requantization_error == 0


def test_types_of_the_source_lose_nothing(plain: Path) -> None:
    stored = load_model(plain, lazy=True)[0]
    wide = load_model(plain, mx.float32)[0]
    compact = slice_model(wide, select_random(wide, 160))
    narrow = in_types_of(compact, stored)
    assert narrow is not None
    assert {a.dtype for a in named_arrays(narrow).values()} == {mx.bfloat16}
    assert mx.array_equal(as_computed(narrow, mx.float32)(TOKENS), compact(TOKENS))


def test_exports_take_no_more_than_the_source_whatever_is_computed_in(
    packed: Path, tmp_path: Path, invoke: Callable[..., str]
) -> None:
    write_adapter(packed)
    made = json.loads(
        invoke("export", "--model", packed, "--task", TASK, "-o", tmp_path / "out", "--json")
    )
    assert made["num_bytes"] <= source_bytes(packed)
    exported = load_model(tmp_path / "out")[0]
    assert stored_bytes(exported) == made["num_bytes"]
    subnet = Assistant.load(packed).subnetwork_for_task(TASK, 160)
    found = as_computed(exported, mx.float32)(TOKENS)
    assert mx.allclose(found, subnet.model(TOKENS), atol=1e-5)  # what chat answers with


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command with a home of its own and returns what it prints."""
    from typer.testing import CliRunner

    from ifp_mlx.cli.app import make_app

    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))

    def run(*words: object) -> str:
        outcome = CliRunner().invoke(make_app(), [str(word) for word in words])
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    return run

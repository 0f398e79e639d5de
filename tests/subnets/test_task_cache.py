"""The cache of sub-networks: hits, damage, budgets and two processes."""

import multiprocessing
import os
import time
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.errors import CacheError, ResourceError, SelectionError
from ifp_mlx.selection.masks import top_k_indices
from ifp_mlx.selection.selection import Selection
from ifp_mlx.subnets.task_cache import CacheKey, SubNetCache, fold_task


def make_key(task: str = "write Python", **changes: object) -> CacheKey:
    fields = {
        "task": task,
        "base": "base-1",
        "adapter": "",
        "selector": "static",
        "selector_version": "1",
        "num_kept_units": 5,
    }
    return CacheKey(**{**fields, **changes})  # type: ignore[arg-type]


def make_selection(seed: int = 0) -> Selection:
    scores = mx.random.uniform(shape=(2, 24), key=mx.random.key(seed))
    return Selection(top_k_indices(scores, 5), 24, "static")


def test_stored_selection_comes_back(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path / "new")
    cache.put(make_key(), make_selection(), "tiny")
    found = cache.get(make_key())
    assert found is not None
    assert mx.array_equal(found.indices, make_selection().indices)
    assert (found.num_units, found.selector) == (24, "static")


def test_requantization_error_is_kept_with_the_entry(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    stored = cache.put(make_key(), make_selection(), "tiny")
    assert stored.requantization_error is None
    for error in (0.0041, 0.0):  # as it is loaded, then exactly
        cache.note_requantization_error(make_key(), error)
        (entry,) = cache.entries()
        assert entry.requantization_error == error
        assert (entry.model_name, entry.created_s) == ("tiny", stored.created_s)
        assert mx.array_equal(entry.load().indices, make_selection().indices)
    cache.note_requantization_error(make_key("write Rust"), 0.1)
    assert len(cache.entries()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "write Rust"},
        {"base": "base-2"},
        {"adapter": "adapter-1"},
        {"selector": "blend"},
        {"selector_version": "2"},
        {"num_kept_units": 6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_is_part_of_the_key(tmp_path: Path, changes: dict[str, object]) -> None:
    cache = SubNetCache(tmp_path)
    cache.put(make_key(), make_selection(), "tiny")
    assert cache.get(make_key(**changes)) is None  # type: ignore[arg-type]


def test_white_space_and_unicode_form_do_not_matter(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    cache.put(make_key("caf\u00e9  menus\n"), make_selection(), "tiny")
    assert cache.get(make_key("cafe\u0301 menus")) is not None
    assert fold_task(" a\t b ") == "a b"


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0notjson!", b"x" * 500])
def test_damaged_entry_is_moved_aside_and_reported(tmp_path: Path, damage: bytes) -> None:
    warnings: list[str] = []
    cache = SubNetCache(tmp_path, on_warning=warnings.append)
    path = cache.put(make_key(), make_selection(), "tiny").path
    path.write_bytes(damage)
    assert cache.get(make_key()) is None
    assert (tmp_path / "quarantine" / path.name).read_bytes() == damage
    assert len(warnings) == 1
    assert "damaged" in warnings[0]
    cache.put(make_key(), make_selection(), "tiny")
    assert cache.get(make_key()) is not None


def test_truncated_entry_is_moved_aside(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    path = cache.put(make_key(), make_selection(), "tiny").path
    path.write_bytes(path.read_bytes()[:-8])
    assert cache.get(make_key()) is None
    assert not path.exists()


def test_entry_of_another_checkpoint_is_not_served(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    other = cache.put(make_key(base="base-2"), make_selection(), "tiny").path
    mine = tmp_path / f"{make_key().digest}.safetensors"
    other.rename(mine)
    assert cache.get(make_key()) is None
    assert (tmp_path / "quarantine" / mine.name).exists()


def test_entry_with_indices_out_of_range_is_not_served(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    bad = Selection(mx.array([[0, 1, 2, 3, 24]] * 2, dtype=mx.int32), 24, "static")
    cache.put(make_key(), bad, "tiny")
    assert cache.get(make_key()) is None


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    for age, task in enumerate(["new", "middle", "old"]):
        entry = cache.put(make_key(task), make_selection(), "tiny")
        os.utime(entry.path, (time.time() - 100 * age,) * 2)
    size = cache.entries()[0].size_bytes
    cache.get(make_key("old"))  # a use makes it the newest
    removed = cache.prune(2 * size + size // 2)
    assert [entry.key.task for entry in removed] == ["middle"]
    assert {entry.key.task for entry in cache.entries()} == {"new", "old"}


def test_byte_budget_is_kept_but_the_newest_entry_stays(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path, max_bytes=1)
    cache.put(make_key("first"), make_selection(), "tiny")
    cache.put(make_key("second"), make_selection(), "tiny")
    assert [entry.key.task for entry in cache.entries()] == ["second"]


def test_find_takes_a_task_or_the_start_of_a_key(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    entry = cache.put(make_key("write  Python"), make_selection(), "tiny")
    assert cache.find("write Python") == entry
    assert cache.find(entry.path.stem[:6]) == entry


def test_find_says_when_there_is_none_or_several(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    with pytest.raises(CacheError, match="no cached sub-network for 'x'"):
        cache.find("x")
    for num_kept_units in (5, 6):
        cache.put(make_key(num_kept_units=num_kept_units), make_selection(), "tiny")
    with pytest.raises(CacheError, match="names 2 cached sub-networks"):
        cache.find("write Python")


def test_verify_names_every_damaged_entry(tmp_path: Path) -> None:
    cache = SubNetCache(tmp_path)
    path = cache.put(make_key("bad"), make_selection(), "tiny").path
    cache.put(make_key("good"), make_selection(), "tiny")
    path.write_bytes(b"junk")
    problems = cache.verify()
    assert len(problems) == 1
    assert path.name in problems[0]
    assert [entry.key.task for entry in cache.entries()] == ["good"]
    assert cache.verify() == []


def test_disk_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[write] No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(ResourceError, match="No space left"):
        SubNetCache(tmp_path).put(make_key(), make_selection(), "tiny")
    assert list(tmp_path.iterdir()) == []


def test_damaged_selection_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(SelectionError, match=r"x\.safetensors is not a selection file"):
        Selection.load(tmp_path / "x.safetensors")


def _build_once(folder: Path, log: Path) -> None:
    cache = SubNetCache(folder)
    with cache.lock(make_key()):
        if cache.get(make_key()) is None:
            with log.open("a") as file:
                file.write("built\n")
            time.sleep(0.3)
            cache.put(make_key(), make_selection(), "tiny")


def test_two_processes_build_one_key_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [
        context.Process(target=_build_once, args=(tmp_path / "cache", log)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.read_text() == "built\n"
    assert SubNetCache(tmp_path / "cache").get(make_key()) is not None


def test_lock_in_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = SubNetCache(tmp_path / "file" / "cache")
    with pytest.raises(CacheError, match="cannot use the cache"), cache.lock(make_key()):
        pass

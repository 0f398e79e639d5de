"""The cache of sub-networks: hits, damage, budgets and two processes."""

import multiprocessing
import os
import time
from pathlib import Path

import mlx.core as mx
import pytest

from ifp_mlx.errors import CacheError, ResourceError, SelectionError
from ifp_mlx.selection.selection import Pick, Selection
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.selection.top_k import top_k_indices
from ifp_mlx.subnets.task_cache import CacheKey, Reuse, TaskCache, fold_task


def make_key(task: str = "write Python", **changes: object) -> CacheKey:
    fields = {
        "task": task,
        "base": "base-1",
        "adapter": "",
        "selector": "static",
        "selector_version": "1",
        "kind": "ffn",
        "num_kept_units": 5,
    }
    return CacheKey(**{**fields, **changes})  # type: ignore[arg-type]


def make_selection(seed: int = 0) -> Selection:
    scores = mx.random.uniform(shape=(2, 24), key=mx.random.key(seed))
    return selection_of(top_k_indices(scores, 5))


def selection_of(indices: mx.array) -> Selection:
    return Selection((Pick("ffn", (0, 1), indices, 24),), SelectorSpec("static"))


def test_stored_selection_comes_back(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path / "new")
    cache.put(make_key(), make_selection(), "tiny")
    found = cache.get(make_key())
    assert found is not None
    selection, reuse = found
    assert mx.array_equal(selection.pick.indices, make_selection().pick.indices)
    assert (selection.num_units, selection.selector) == (24, SelectorSpec("static"))
    assert reuse is None


def test_what_cutting_showed_is_kept_with_the_entry(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    stored = cache.put(make_key(), make_selection(), "tiny")
    assert stored.requantization_error is None
    for error in (0.0041, 0.0):  # as it is loaded, then exactly
        cache.note_cut(make_key(), error, 1234)
        (entry,) = cache.entries()
        assert (entry.requantization_error, entry.memory_bytes) == (error, 1234)
        assert (entry.model_name, entry.created_s) == ("tiny", stored.created_s)
        assert mx.array_equal(entry.load().pick.indices, make_selection().pick.indices)
    cache.note_cut(make_key("write Rust"), 0.1, 1)
    assert len(cache.entries()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "write Rust"},
        {"base": "base-2"},
        {"adapter": "adapter-1"},
        {"selector": "blend"},
        {"selector_version": "2"},
        {"kind": "expert"},
        {"num_kept_units": 6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_is_part_of_the_key(tmp_path: Path, changes: dict[str, object]) -> None:
    cache = TaskCache(tmp_path)
    cache.put(make_key(), make_selection(), "tiny")
    assert cache.get(make_key(**changes)) is None  # type: ignore[arg-type]


def test_white_space_and_unicode_form_do_not_matter(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    cache.put(make_key("caf\u00e9  menus\n"), make_selection(), "tiny")
    assert cache.get(make_key("cafe\u0301 menus")) is not None
    assert fold_task(" a\t b ") == "a b"


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0notjson!", b"x" * 500])
def test_damaged_entry_is_moved_aside_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    cache = TaskCache(tmp_path)
    path = cache.put(make_key(), make_selection(), "tiny").path
    path.write_bytes(damage)
    assert cache.get(make_key()) is None
    assert (tmp_path / "quarantine" / path.name).read_bytes() == damage
    assert len(caplog.messages) == 1
    assert "damaged" in caplog.messages[0]
    cache.put(make_key(), make_selection(), "tiny")
    assert cache.get(make_key()) is not None


def test_truncated_entry_is_moved_aside(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    path = cache.put(make_key(), make_selection(), "tiny").path
    path.write_bytes(path.read_bytes()[:-8])
    assert cache.get(make_key()) is None
    assert not path.exists()


def test_entry_of_another_checkpoint_is_not_served(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    other = cache.put(make_key(base="base-2"), make_selection(), "tiny").path
    mine = tmp_path / f"{make_key().digest}.safetensors"
    other.rename(mine)
    assert cache.get(make_key()) is None
    assert (tmp_path / "quarantine" / mine.name).exists()


def test_entry_with_indices_out_of_range_is_not_served(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    bad = selection_of(mx.array([[0, 1, 2, 3, 24]] * 2, dtype=mx.int32))
    cache.put(make_key(), bad, "tiny")
    assert cache.get(make_key()) is None


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    for age, task in enumerate(["new", "middle", "old"]):
        entry = cache.put(make_key(task), make_selection(), "tiny")
        os.utime(entry.path, (time.time() - 100 * age,) * 2)
    size = cache.entries()[0].size_bytes
    cache.get(make_key("old"))  # a use makes it the newest
    removed = cache.prune(2 * size + size // 2)
    assert [entry.key.task for entry in removed] == ["middle"]
    assert {entry.key.task for entry in cache.entries()} == {"new", "old"}


def test_byte_budget_is_kept_but_the_newest_entry_stays(tmp_path: Path) -> None:
    for task in ("first", "second"):
        TaskCache(tmp_path, max_bytes=1).put(make_key(task), make_selection(), "tiny")
    assert [entry.key.task for entry in TaskCache(tmp_path).entries()] == ["second"]


def test_a_task_in_use_stays_whatever_the_budget_says(tmp_path: Path) -> None:
    TaskCache(tmp_path).put(make_key("used"), make_selection(), "tiny")
    using = TaskCache(tmp_path)
    assert using.get(make_key("used"))
    for task in ("second", "third"):
        TaskCache(tmp_path, max_bytes=1).put(make_key(task), make_selection(), "tiny")
    assert {entry.key.task for entry in using.entries()} == {"used", "third"}
    using.prune(0)  # asked for by name
    assert using.entries() == []


def test_find_takes_a_task_or_the_start_of_a_key(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    entry = cache.put(make_key("write  Python"), make_selection(), "tiny")
    assert cache.find("write Python") == entry
    assert cache.find(entry.path.stem[:6]) == entry


def test_find_says_when_there_is_none_or_several(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    with pytest.raises(CacheError, match="no cached sub-network for 'x'"):
        cache.find("x")
    for num_kept_units in (5, 6):
        cache.put(make_key(num_kept_units=num_kept_units), make_selection(), "tiny")
    with pytest.raises(CacheError, match="names 2 cached sub-networks"):
        cache.find("write Python")


def test_verify_names_every_damaged_entry(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
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
        TaskCache(tmp_path).put(make_key(), make_selection(), "tiny")
    assert list(tmp_path.iterdir()) == []


def test_damaged_selection_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(SelectionError, match=r"x\.safetensors is not a selection file"):
        Selection.load(tmp_path / "x.safetensors")


def _build_once(folder: Path, log: Path) -> None:
    cache = TaskCache(folder)
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
    assert TaskCache(tmp_path / "cache").get(make_key()) is not None


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TaskCache(tmp_path / "file" / "cache")
    with cache.lock(make_key()):
        pass
    with pytest.raises(ResourceError, match="cannot write"):
        cache.put(make_key(), make_selection(), "tiny")


def test_damaged_entry_does_not_harm_the_search_for_another_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TaskCache(tmp_path)
    near = cache.put(make_key("near"), make_selection(), "tiny").path
    damaged = cache.put(make_key("damaged"), make_selection(1), "tiny").path
    content = damaged.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    # The header is whole, which is all that a listing reads; the indices are out of range.
    damaged.write_bytes(content[:size] + b"\x7f" * (len(content) - size))
    found = cache.find_overlapping(make_key("new"), make_selection(), 0.5)
    assert found is not None
    assert found[0] == Reuse("near", 1.0)
    assert near.exists()
    assert (tmp_path / "quarantine" / damaged.name).exists()
    assert "damaged" in caplog.text


def test_reuse_is_remembered_with_the_entry(tmp_path: Path) -> None:
    cache = TaskCache(tmp_path)
    reuse = Reuse("write Python", 0.875)
    entry = cache.put(make_key("help with Python"), make_selection(), "tiny", reuse=reuse)
    assert entry.reuse == reuse
    found = cache.get(make_key("help with Python"))
    assert found is not None
    assert found[1] == reuse


def test_entries_of_older_formats_are_made_again_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / f"{'0' * 32}.safetensors"
    header = {"format_version": "1", "task": "write Python", "num_units": "24"}
    mx.save_safetensors(str(old), {"indices": mx.zeros((2, 5), mx.int32)}, header)
    cache = TaskCache(tmp_path)
    assert cache.entries() == []
    assert cache.get(make_key()) is None
    assert cache.verify() == []
    cache.put(make_key(), make_selection(), "tiny")
    assert not old.exists()
    assert not caplog.messages

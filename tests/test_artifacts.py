"""The store of artifacts: whole or not there, and the same bytes when read."""

import hashlib
import json
import os

import pytest

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError
from bitsmith.run.task import Task, in_order, task_key
from bitsmith.store.artifacts import ArtifactStore, seal
from bitsmith.store.digests import SourceDigests

KEY = "ab" * 32
FILE_DIGEST = hashlib.file_digest


def _staged(store, key=KEY, files=(("model.gguf", b"weights"), ("sub/x", b"1"))):
    staged = store.stage(key, 1)
    (staged / "files").mkdir(parents=True)
    for name, data in files:
        path = staged / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return staged


def _put(store, key=KEY, **options):
    staged = _staged(store, key, **options)
    seal(staged, {"b": 1, "a": [None, 2.5]})
    store.put(key, staged, {"seconds": 3.0})


def test_an_artifact_is_read_back_by_its_key(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    with store.writing():
        assert not store.has(KEY)
        _put(store)
    again = ArtifactStore(tmp_path / "store")
    assert again.has(KEY)
    assert (again.path(KEY) / "sub/x").read_bytes() == b"1"
    assert again.result(KEY) == {"a": [None, 2.5], "b": 1}
    assert again.cost(KEY) == {"seconds": 3.0}
    assert again.keys() == [KEY]


def test_the_digest_is_that_of_files_and_result_and_not_of_what_making_them_took(tmp_path):
    stores = [ArtifactStore(tmp_path / name) for name in "abc"]
    for store, seconds in zip(stores, (1.0, 2.0, 2.0), strict=True):
        staged = _staged(store, files=(("x", b"1" if store is not stores[2] else b"2"),))
        seal(staged, {})
        store.put(KEY, staged, {"seconds": seconds})
    digests = [store.digest(KEY) for store in stores]
    assert digests[0] == digests[1] != digests[2]


def test_nothing_is_there_before_it_is_sealed_and_put(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    staged = _staged(store)
    with pytest.raises(DamagedFileError, match="manifest"):
        store.put(KEY, staged)
    seal(staged, {})
    assert not store.has(KEY)
    with pytest.raises(BitsmithError, match="no such artifact"):
        store.path(KEY)
    (staged / "files/model.gguf").write_bytes(b"short")
    with pytest.raises(DamagedFileError, match=r"model\.gguf: has 5 bytes, the manifest says 7"):
        store.put(KEY, staged)


def test_what_is_left_of_an_artifact_makes_way_for_it_whole(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    _put(store)
    (tmp_path / "store/objects/ab" / KEY / "manifest.json").unlink()
    again = ArtifactStore(tmp_path / "store")
    assert not again.has(KEY)
    _put(again)
    assert (ArtifactStore(tmp_path / "store").path(KEY) / "model.gguf").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "result", "manifest"])
def test_damage_is_found_when_it_is_read(tmp_path, damage):
    store = ArtifactStore(tmp_path / "store")
    _put(store)
    folder = tmp_path / "store/objects/ab" / KEY
    if damage == "changed":
        (folder / "files/model.gguf").write_bytes(b"weighty")
    if damage == "missing":
        (folder / "files/model.gguf").unlink()
    if damage == "added":
        (folder / "files/other").write_bytes(b"")
    if damage == "result":
        (folder / "result.json").write_text(json.dumps({}))
    if damage == "manifest":
        (folder / "manifest.json").write_text('{"files": {"result.json": {}, "/etc/passwd": 1}}')
    with pytest.raises(DamagedFileError):
        ArtifactStore(tmp_path / "store").path(KEY)


def test_one_artifact_is_removed_when_told(tmp_path):
    store, other = ArtifactStore(tmp_path / "store"), "cd" * 32
    _put(store)
    _put(store, other)
    store.discard(other)
    assert store.keys() == [KEY]


def test_a_second_run_on_a_store_is_refused_and_leftovers_are_cleared(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    with store.writing():
        left = _staged(store)
        with pytest.raises(OutputError, match="is being written by another run"), store.writing():
            pass
        assert left.is_dir()
    with store.writing():
        assert not left.exists()


def test_links_are_no_artifact(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    staged = _staged(store)
    (staged / "files/link").symlink_to(tmp_path)
    with pytest.raises(BitsmithError, match="link: is a link"):
        seal(staged, {})


def _key(needs=(), source="s" * 64, version="1", **changes):
    task = Task("t", "assay", {"model": "/a/model.gguf", "ranks": [1, 2]}, sources=("model",))
    task = Task(**{**task.__dict__, "needs": tuple(dict(needs)), **changes})
    return task_key(task, dict(needs), {"model": source}, version)


def test_the_key_is_of_what_the_artifact_depends_on_and_nothing_else():
    same = [_key(), _key(name="u"), _key(retries=5), _key(params={"ranks": [1, 2], "model": "/b/other.gguf"})]
    assert len(set(same)) == 1
    others = [
        _key(action="inspect"),
        _key(params={"ranks": [2, 1], "model": "/a/model.gguf"}),
        _key(params={"ranks": [1, 2], "model": "/a/model.bin"}),
        _key(source="t" * 64),
        _key(version="2"),
        _key(needs=[("x", "1")]),
        _key(needs=[("x", "2")]),
        _key(needs=[("y", "1")]),
    ]
    assert len({same[0], *others}) == 9


def test_graphs_that_cannot_be_run_are_refused():
    with pytest.raises(BitsmithError, match="circle, or a task that does: a, b, c"):
        in_order([Task("a", "x", needs=("b",)), Task("b", "x", needs=("a",)), Task("c", "x", needs=("b",))])
    with pytest.raises(BitsmithError, match="'a' needs 'z', no such task"):
        in_order([Task("a", "x", needs=("z",))])
    with pytest.raises(BitsmithError, match="two tasks are named 'a'"):
        in_order([Task("a", "x"), Task("a", "y")])
    with pytest.raises(BitsmithError, match="'m' is no path"):
        in_order([Task("a", "x", sources=("m",))])
    with pytest.raises(BitsmithError, match="not JSON"):
        task_key(Task("a", "x", {"v": float("nan")}), {}, {})
    ordered = in_order([Task("c", "x", needs=("a", "b")), Task("b", "x", needs=("a",)), Task("a", "x")])
    assert [task.name for task in ordered] == ["a", "b", "c"]


def test_the_digest_of_a_source_is_of_its_content(tmp_path):
    digests = SourceDigests(tmp_path / "cache.json")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub/x").write_bytes(b"1")
    (second / ".hidden").write_bytes(b"2")
    assert digests.of(first) == digests.of(second) != digests.of(first / "sub/x")
    digests.save()
    (second / "sub/x").write_bytes(b"12")
    later = SourceDigests(tmp_path / "cache.json")
    assert later.of(first) == digests.of(first) != later.of(second)
    with pytest.raises(BitsmithError, match="cannot be read: No such file"):
        digests.of(tmp_path / "none")


def test_bytes_changed_under_an_old_date_are_seen_and_known_ones_not_read_again(tmp_path, monkeypatch):
    path, digests = tmp_path / "model.gguf", SourceDigests(tmp_path / "cache.json")
    path.write_bytes(b"one")
    first, stat = digests.of(path), path.stat()
    read = []
    monkeypatch.setattr("hashlib.file_digest", lambda *given: read.append(given) or FILE_DIGEST(*given))
    assert digests.of(path) == first
    assert not read
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = digests.of(path)
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    assert digests.of(path) == first != second
    assert len(read) == 2


def test_a_snapshot_of_links_is_its_content(tmp_path):
    plain, snapshot, blobs = tmp_path / "plain", tmp_path / "snapshots/0123", tmp_path / "blobs"
    for folder in (plain / "sub", snapshot, blobs):
        folder.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors", "sub/more")):
        (plain / name).write_text(name)
        (blobs / str(number)).write_text(name)
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/more").symlink_to(blobs / "2")
    (snapshot / "sub").symlink_to(tmp_path / "elsewhere")
    digests = SourceDigests(tmp_path / "cache.json")
    whole = digests.of(plain)
    assert digests.of(snapshot) == whole
    (snapshot / "circle").symlink_to(snapshot)
    assert digests.of(snapshot) == whole
    (blobs / "2").write_text("else")
    assert digests.of(snapshot) != whole

"""Models of a hub: the real huggingface_hub client and a server that speaks its protocol, and its faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download
from safetensors.numpy import save

from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.lab.models import STUDENT_MODEL, TEACHER_MODEL
from bitsmith.run.compress import compress
from bitsmith.run.inspect import inspect
from bitsmith.run.job import Job
from bitsmith.run.push import push
from bitsmith.run.verify import verify
from bitsmith.store import hub_calls, open_checkpoint, open_gguf
from bitsmith.store.hub import HubError, called, local, origin, parse_hub_id
from bitsmith.store.hub_names import told
from hub_server import TOKEN, Hub, git_sha, serving

ITS_OWN = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's uploads
REPO = "org/tiny"
WEIGHTS = save({"w": np.arange(60_000, dtype=np.float32)})
FILES = {"config.json": b'{"model_type": "none"}', "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that is asked in this process, with an empty cache; waits are cut to nothing."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        monkeypatch.setattr(hub_calls, "_FIRST_WAIT_SECONDS", 0.01)
        monkeypatch.chdir(tmp_path)
        yield served


def files_of(folder: Path) -> dict[str, bytes]:
    """Return a folder's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def asked_for(hub: Hub, name: str) -> list[str | None]:
    """Return the ranges that a file's storage was asked for."""
    return [headers.get("Range") for how, path, headers in hub.asked if how == "GET" and name in path]


@pytest.mark.parametrize(
    ("given", "repo", "revision", "what"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "main", None),
        ("a/b@v1.0", "a/b", "v1.0", None),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3", None),
        ("a/b@feature/x", "a/b", "feature/x", None),
        ("a/b:Q4_K_M", "a/b", "main", "Q4_K_M"),
        ("a/b:latest", "a/b", "main", None),
        ("a/b@dev:IQ2_XXS", "a/b", "dev", "IQ2_XXS"),
        ("a/b/c-Q8_0.gguf", "a/b", "main", "c-Q8_0.gguf"),
        ("a/b@dev/sub/c.gguf", "a/b", "dev", "sub/c.gguf"),
        ("https://huggingface.co/a/b", "a/b", "main", None),
        ("https://huggingface.co/a/b/tree/dev", "a/b", "dev", None),
        ("https://huggingface.co/a/b/blob/main/c.gguf", "a/b", "main", "c.gguf"),
        ("hf.co/a/b:Q4_K_M", "a/b", "main", "Q4_K_M"),
        ("hf://a/b@v1", "a/b", "v1", None),
    ],
)
def test_names_of_a_hub_are_read(given: str, repo: str, revision: str, what: str | None) -> None:
    for spelled in (given, Path(given).as_posix()):
        found = parse_hub_id(spelled)
        assert found is not None
        assert (found.repo, found.revision, found.tag or found.inside) == (repo, revision, what)


@pytest.mark.parametrize(
    "given",
    ["/a/b", "../a/b", "~/a", "a", "out/model.gguf", "a/b.safetensors", "a--b/c", "a/..", "a b/c", ".a/b"],
)
def test_paths_are_no_names_of_a_hub(given: str) -> None:
    assert parse_hub_id(given) is None


def test_a_model_comes_into_the_cache_whole_and_alone(hub: Hub) -> None:
    """Faults 11 and 38 on a hub: pickles, archives and other files are not even asked for."""
    others = {"pytorch_model.bin": b"\x80", "model.zip": b"PK", "x.py": b"", "consolidated.safetensors": b"?"}
    commit = hub.add(REPO, FILES | others)
    path = local(REPO)
    assert files_of(path) == FILES
    assert (str(origin(path)), called(path), told(path)) == (f"{REPO}@{commit}", "tiny", f"{REPO}@{commit}")
    assert open_checkpoint(Path(REPO))["w"].read().tobytes() == np.arange(60_000, dtype=np.float32).tobytes()
    assert not [
        path for path in hub.paths() if path.endswith((".bin", ".zip", ".py", "consolidated.safetensors"))
    ]
    assert snapshot_download(REPO, local_files_only=True, cache_dir=constants.HF_HUB_CACHE) == str(path)


def test_what_is_there_is_not_downloaded_again(hub: Hub) -> None:
    hub.add(REPO, FILES)
    local(REPO)
    hub.asked.clear()
    local(REPO)
    assert not [path for path in hub.paths() if "/resolve/" in path or "/storage/" in path]


def test_a_path_that_exists_wins(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert local(REPO) == Path(REPO)
    assert not hub.asked


def test_a_path_in_a_folder_that_is_here_is_told_to_no_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(BitsmithError, match="does not exist"):
        local("models/private/name")
    assert not hub.asked


def test_a_dropped_download_goes_on_where_it_was(hub: Hub) -> None:
    """Fault 37: the rest is asked for by its range, the bytes are those of the commit."""
    hub.add(REPO, FILES)
    hub.fail("GET /storage", drop_after=70_000, times=2)
    assert files_of(local(REPO)) == FILES
    assert asked_for(hub, "/storage/") == [None, "bytes=70000-", "bytes=140000-"]


def test_a_killed_download_goes_on_in_the_next_run(hub: Hub) -> None:
    hub.add(REPO, FILES)
    hub.fail("GET /storage", drop_after=70_000)
    hub.fail("GET /.*resolve.*safetensors", 404, times=0)
    fault = hub.fail("GET /.*resolve.*model.safetensors", 403, times=0)
    hub.before = lambda line: setattr(fault, "times", 1) if asked_for(hub, "/storage/") else None
    with pytest.raises(HubError, match="403"):
        local(REPO)
    assert not (Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "refs").exists()
    hub.before = None
    fault.times = 0
    assert files_of(local(REPO)) == FILES
    assert asked_for(hub, "/storage/") == [None, "bytes=70000-"]


def test_a_hub_that_knows_no_ranges_sends_all_again(hub: Hub) -> None:
    hub.add(REPO, FILES)
    hub.fail("GET /storage", drop_after=70_000)
    hub.fail("GET /storage", ignores_range=True)
    assert files_of(local(REPO)) == FILES


def test_a_stalled_connection_is_given_up_and_tried_again(hub: Hub) -> None:
    hub.add(REPO, FILES)
    hub.fail("GET /storage", stall_seconds=1.5)
    assert files_of(local(REPO)) == FILES


def test_other_bytes_than_the_commit_has_are_refused(hub: Hub) -> None:
    hub.add(REPO, FILES)
    hub.fail("GET /storage", replaced=bytes(len(WEIGHTS)), times=9)
    with pytest.raises(HubError, match=r"model\.safetensors: .*digest [0-9a-f]{64} after downloading"):
        local(REPO)
    hub.faults.clear()
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.fail("GET .*config", replaced=b'{"model_type": "evil"}', times=9)
    with pytest.raises(HubError, match=r"config\.json: .*digest [0-9a-f]{40} after downloading"):
        local(REPO)
    hub.faults.clear()
    assert files_of(local(REPO)) == FILES


def test_a_torn_part_of_an_earlier_run_is_thrown_away(hub: Hub) -> None:
    hub.add(REPO, FILES)
    path = local(REPO) / "model.safetensors"
    blob = path.resolve()
    part = blob.with_name(f"{blob.name}.bitsmith.incomplete")
    part.write_bytes(bytes(70_000))
    path.unlink()
    blob.unlink()
    assert files_of(local(REPO)) == FILES
    assert asked_for(hub, "/storage/")[-2:] == ["bytes=70000-", None]


def test_all_files_are_of_one_commit_though_the_branch_moves(hub: Hub) -> None:
    """Fault 37: the revision is resolved once; a push in the middle of a download changes nothing."""
    first = hub.add(REPO, FILES)
    moved = FILES | {"config.json": b'{"model_type": "moved"}', "model.safetensors": WEIGHTS[:-1] + b"\1"}

    def move(line: str) -> None:
        if "/resolve/" in line and hub.repos[REPO].refs["main"] == first:
            hub.add(REPO, moved)

    hub.before = move
    path = local(REPO)
    assert files_of(path) == FILES
    assert str(origin(path)) == f"{REPO}@{first}"
    hub.before = None
    again = local(REPO)
    assert files_of(again) == moved
    assert files_of(local(f"{REPO}@{first}")) == FILES
    assert all(re.search(r"/resolve/[0-9a-f]{40}/", path) for path in hub.paths() if "/resolve/" in path)


@pytest.mark.parametrize("tags_by_git", [True, False])
def test_a_hub_whose_listing_tells_no_digests_is_asked_for_them(hub: Hub, tags_by_git: bool) -> None:
    hub.add(REPO, FILES)
    hub.lists_sizes, hub.tags_by_git = False, tags_by_git  # a tag that is no digest is only a name
    assert files_of(local(REPO)) == FILES


def test_branches_and_tags_are_taken(hub: Hub) -> None:
    hub.add(REPO, FILES)
    other = FILES | {"config.json": b'{"model_type": "other"}'}
    hub.add(REPO, other, revision="feature/x")
    assert files_of(local(f"{REPO}@feature/x")) == other


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "said", "code"),
    [
        ("GET /api/models", 401, {}, "the hub asks for a valid token (401)", 1),
        ("GET /api/models", 403, {"X-Error-Message": "not on the list"}, "forbids it (403)", 1),
        ("GET /api/models", 404, {"X-Error-Code": "RepoNotFound"}, "the hub has none (404)", 1),
        ("GET /api/models", 404, {"X-Error-Code": "RevisionNotFound"}, "no such revision (404)", 1),
        ("GET /api/models", 403, {"X-Error-Code": "GatedRepo"}, "is gated (403): accept its terms", 1),
        ("GET /.*/resolve/", 401, {"X-Error-Code": "GatedRepo"}, "is gated (401): accept its terms", 1),
        ("GET /.*/resolve/", 404, {"X-Error-Code": "EntryNotFound"}, "no such file (404)", 1),
        ("GET /api/models", 429, {"Retry-After": "3600"}, "(429): try again in 3600 seconds", 4),
        ("GET /api/models", 429, {"ratelimit": '"api";r=0;t=900'}, "(429): try again in 900 seconds", 4),
        ("GET /.*/resolve/", 429, {"Retry-After": "0"}, "too many requests (429)", 4),
        ("GET /api/models", 503, {}, "the hub fails (503)", 4),
        ("GET /storage", 500, {}, "the hub fails (500)", 4),
        ("GET /api/models", 200, {}, "the hub's answer cannot be read", 1),
        ("GET /api/models", 418, {}, "the hub refuses (418)", 1),
    ],
)
def test_refusals_are_one_line(
    hub: Hub, pattern: str, status: int, headers: dict[str, str], said: str, code: int
) -> None:
    hub.add(REPO, FILES)
    hub.fail(pattern, status, headers=headers, times=99, body=b"<html>no</html>")
    with pytest.raises(HubError) as error:
        local(REPO)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == code
    assert len(hub.asked) < 16


def test_a_busy_hub_is_asked_again_after_the_time_it_names(hub: Hub) -> None:
    hub.add(REPO, FILES)
    hub.fail("GET /api/models", 429, headers={"Retry-After": "0"})
    hub.fail("GET /api/models", 502)
    hub.fail("GET /storage", 503, times=2)
    assert files_of(local(REPO)) == FILES


def test_a_gated_or_private_model_needs_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES, gated=True)
    hub.add("org/private", FILES, private=True)
    with pytest.raises(HubError, match="is gated"):
        local(REPO)
    with pytest.raises(HubError, match="private"):
        local("org/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(local(REPO)) == files_of(local("org/private")) == FILES
    told_to = [headers for _, path, headers in hub.asked if "/storage/" in path]
    assert told_to
    assert not any("authorization" in map(str.lower, headers) for headers in told_to)  # of another host


def test_offline_the_cache_answers_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES)
    path = local(REPO)
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local(REPO) == path
    with pytest.raises(HubError, match=r"org/other: .*not in the cache .*offline"):
        local("org/other")
    (path / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"has not all of it"):
        local(REPO)
    assert not hub.asked


def test_the_cache_answers_for_a_hub_that_is_gone(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    commit = hub.add(REPO, FILES)
    path = local(REPO)
    hub.fail("GET /api/models", 503, times=99)
    assert local(REPO) == path
    assert f"taking {REPO}@{commit} of the cache" in caplog.text


def test_of_shards_those_of_the_index_are_taken(hub: Hub) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": save({f"w{n}": np.ones(n, np.float32)}) for n in (1, 2)}
    index = {"weight_map": {f"w{n}": name for n, name in enumerate(shards, 1)}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()} | shards
    hub.add(REPO, files | {"consolidated.safetensors": WEIGHTS})
    path = local(REPO)
    assert files_of(path) == files
    hub.add("org/torn", {name: data for name, data in files.items() if "00002-of" not in name})
    with pytest.raises(BitsmithError, match="names shards that are not there: model-00002-of-00002"):
        local("org/torn")


GGUFS = {"m-Q4_K_M.gguf": b"4", "sub/m-Q8_0.gguf": b"8", "mmproj-m-F16.gguf": b"v", "m-Q4_K_S.gguf": b"s"}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (f"{REPO}:Q4_K_M", "m-Q4_K_M.gguf"),
        (f"{REPO}:q8_0", "sub/m-Q8_0.gguf"),
        (f"{REPO}/m-Q4_K_S.gguf", "m-Q4_K_S.gguf"),
        (f"{REPO}/sub/m-Q8_0.gguf", "sub/m-Q8_0.gguf"),
        (f"{REPO}/sub", "sub/m-Q8_0.gguf"),
    ],
)
def test_one_gguf_of_several_is_taken_by_tag_or_name(hub: Hub, given: str, name: str) -> None:
    hub.add(REPO, GGUFS | {"README.md": b""})
    path = local(given)
    assert path.read_bytes() == GGUFS[name]
    assert path.as_posix().endswith(f"/{name}")
    assert len([path for path in hub.paths() if "/storage/" in path]) == 1


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        (
            GGUFS,
            REPO,
            "has several models, name one as org/tiny/FILE: m-Q4_K_M.gguf, m-Q4_K_S.gguf, sub/m-Q8_0",
        ),
        (GGUFS, f"{REPO}:Q2_K", "no file answers to it; it has m-Q4_K_M.gguf"),
        (GGUFS, f"{REPO}/no.gguf", "has no no.gguf"),
        ({"pytorch_model.bin": b"", "config.json": b"{}"}, REPO, "has only pickle files (pytorch_model.bin)"),
        ({"README.md": b""}, REPO, "is no model: it has README.md"),
        ({"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}, REPO, "has several safetensors files"),
        ({"m-00001-of-00002.gguf": b""}, REPO, "lacks parts of m-00001-of-00002.gguf: m-00002-of-00002.gguf"),
        ({"../../up.gguf": b"", "a\\b.gguf": b""}, REPO, "is no model"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_a_download(
    hub: Hub, files: dict[str, bytes], given: str, said: str
) -> None:
    hub.add(REPO, files)
    with pytest.raises(BitsmithError) as error:
        local(given)
    assert said in str(error.value)
    assert not [path for path in hub.paths() if "/resolve/" in path]
    assert isinstance(error.value, UnsupportedError) == ("pickle" in said or "no model" in said)


def test_a_tokenizer_comes_without_weights(hub: Hub) -> None:
    hub.add(REPO, FILES | {"tokenizer.json": b"{}"})
    assert sorted(files_of(local(REPO, weights=False))) == ["config.json", "tokenizer.json"]


def test_names_and_metadata_tell_the_repository(hub: Hub, tmp_path: Path) -> None:
    """The default name, `general.name`, record and inspection say what the snapshot's path does not."""
    commit = hub.add(REPO, files_of(STUDENT_MODEL))
    record = compress(Job(model=Path(REPO), type_name="Q8_0"))
    assert str(record.out) == "tiny-Q8_0.gguf"
    with open_gguf(tmp_path / "tiny-Q8_0.gguf") as made:
        assert made.metadata["general.name"] == "tiny"
        assert made.metadata["bitsmith.source"] == f"{REPO}@{commit}"
        assert made.metadata["general.source.huggingface.repository"] == REPO
    kept = json.loads((tmp_path / "tiny-Q8_0.gguf.record.json").read_text())
    assert kept["sources"]["model"]["hub"] == f"{REPO}@{commit}"
    assert kept["sources"]["model"]["name"] == "tiny"
    assert str(origin(inspect(Path(REPO)).path)) == f"{REPO}@{commit}"


def output(tmp_path: Path, name: str = "small.gguf") -> Path:
    """Write something to push: the bundled student in Q8_0."""
    compress(Job(model=STUDENT_MODEL, out=tmp_path / name, type_name="Q8_0"))
    return tmp_path / name


@ITS_OWN
def test_an_output_is_pushed_verified_and_comes_back(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = output(tmp_path)
    planned = push(out, "me/small", {"README.md": b"# card\n"}, dry_run=True)
    assert planned.commit is None
    assert planned.creates
    assert not hub.repos
    made = push(out, "me/small", {"README.md": b"# card\n"}, private=True)
    assert made.commit is not None
    held = hub.repos["me/small"].commits[made.commit]
    assert hub.repos["me/small"].private
    assert held["small.gguf"] == out.read_bytes()
    assert b'"path"' not in held["small.gguf.record.json"]  # where it lay is nobody's business
    back = local("me/small")
    assert back.name == "small.gguf"
    found = subprocess.run(
        ["sha256sum", "-c", "small.gguf.sha256"], check=False, cwd=back.parent, capture_output=True
    )
    assert found.returncode == 0, found
    again = push(out, "me/small", {"README.md": b"# card\n"})
    assert again.commit == made.commit
    assert {row.state for row in again.files} == {"same"}


def test_what_does_not_verify_is_not_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = output(tmp_path)
    with out.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    with pytest.raises(BitsmithError, match=r"small\.gguf"):
        push(out, "me/small", {})
    (tmp_path / "small.gguf.sha256").unlink()
    with pytest.raises(BitsmithError, match="is missing"):
        push(out, "me/small", {})
    assert not hub.asked


@ITS_OWN
@pytest.mark.slow
def test_a_folder_is_pushed_and_verifies_where_it_was_pulled(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = tmp_path / "small-W4A16"
    compress(Job(model=STUDENT_MODEL, out=out, type_name="W4A16"))
    made = push(out, "me/small-W4A16", {"README.md": b"# card\n"})
    held = hub.repos["me/small-W4A16"].commits[str(made.commit)]
    assert {"SHA256SUMS", "bitsmith.record.json", "config.json", "model.safetensors"} < set(held)
    back = local("me/small-W4A16")
    found = verify(back, STUDENT_MODEL)
    assert found.passed and len(found.tensors) > 10, found
    assert "pass --source" in verify(back).skipped  # whose path was not published
    assert push(out, "me/small-W4A16", {"README.md": b"# card\n"}).commit == made.commit
    weights = back / "model.safetensors"
    broken = weights.read_bytes()[:-1] + b"\x01"
    weights.unlink()
    weights.write_bytes(broken)
    assert "model.safetensors" in str(verify(back, STUDENT_MODEL).faults[0].path)


@ITS_OWN
def test_a_push_replaces_nothing_unasked(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = output(tmp_path)
    first = hub.add("me/small", {"README.md": b"by hand", "other.txt": b"stays"})
    with pytest.raises(
        BitsmithError, match=r"me/small@main: holds other bytes of README\.md; pass --overwrite"
    ):
        push(out, "me/small", {"README.md": b"# card\n"})
    assert hub.repos["me/small"].refs["main"] == first
    made = push(out, "me/small", {"README.md": b"# card\n"}, overwrite=True, revision="dev")
    held = hub.repos["me/small"].commits[str(made.commit)]
    assert (held["README.md"], held["other.txt"]) == (b"# card\n", b"stays")
    assert hub.repos["me/small"].refs["main"] == first


@ITS_OWN
def test_a_push_beside_another_is_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = output(tmp_path)
    hub.add("me/small", {"other.txt": b"1"})
    hub.before = lambda line: hub.add("me/small", {"other.txt": b"2"}) and None if "PUT" in line else None
    with pytest.raises(HubError, match=r"412.*A commit has happened since"):
        push(out, "me/small", {})


@ITS_OWN
@pytest.mark.parametrize(
    ("pattern", "status", "said"),
    [
        ("POST /api/repos/create", 403, "forbids it (403)"),
        ("PUT /upload", 500, "fails (500)"),
        ("POST .*/commit/", 503, "fails (503)"),
        ("POST .*/preupload/", 401, "(401)"),
    ],
)
def test_a_push_that_fails_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, status: int, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # the client's own waits
    out = output(tmp_path)
    hub.fail(pattern, status, times=99)
    with pytest.raises(HubError) as error:
        push(out, "me/small", {})
    assert said in str(error.value)
    held = hub.repos.get("me/small")
    assert held is None or len(held.commits) == 1


def bitsmith(hub: Hub, tmp_path: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, with a hub and a cache by the environment alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **more}
    return subprocess.run(
        [sys.executable, "-m", "bitsmith.cli.main", *words],
        env=env,
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_takes_a_name_of_a_hub(hub: Hub, tmp_path: Path) -> None:
    student = hub.add("lab/student", files_of(STUDENT_MODEL))
    hub.add("lab/teacher", files_of(TEACHER_MODEL))
    words = " ".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(3000))
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text(words[::-1])
    (tmp_path / "s.yaml").write_text(
        "version: 1\nmodels: {s: lab/student}\ntexts: {t: a.txt}\nrecipes: {q: {type: Q8_0}}\n"
        "evaluations: [{text: t, ctx: 64, chunks: 2}]\n"
    )
    ran: list[str] = []

    def run(*line: str, **more: str) -> subprocess.CompletedProcess[str]:
        done = bitsmith(hub, tmp_path, *line, **more)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        ran.append(line[0])
        return done

    run("inspect", "lab/student")
    run("assay", "lab/student", "-o", "assay", "--match", "layers.0.mlp.up")
    run("calibrate", "lab/student", "-o", "stats", "--text", "a.txt", "--ctx", "64", "--chunks", "4")
    run("compress", "lab/student", "--type", "Q8_0")
    run("evaluate", "lab/student", "student-Q8_0.gguf", "--text", "a.txt", "--ctx", "64", "--chunks", "2",
        "--json", "e.json")  # fmt: skip
    run("compare", "lab/student", "student-Q8_0.gguf")
    run("verify", "student-Q8_0.gguf", "--source", "lab/student")
    run("generate", "lab/student", "-p", "def", "-n", "2")
    run("merge", "lab/teacher", "lab/student", "--text", "a.txt", "-o", "merged", "--dry-run", "--ctx", "64")
    run("lab", "embed", "lab/student", "bigger", "--hidden", "256")
    run("study", "s.yaml", "-o", "study")
    assert json.loads((tmp_path / "study" / "commits.json").read_text()) == {"lab/student": student}
    pushed = run("push", "student-Q8_0.gguf", "me/made", "--measured", "e.json", HF_TOKEN=TOKEN)
    assert "pushed me/made@" in pushed.stdout
    card = hub.repos["me/made"].commits[hub.repos["me/made"].refs["main"]]["README.md"].decode()
    assert "base_model:\n- lab/student" in card
    assert "KLD" in card
    hub.asked.clear()
    run("inspect", "lab/student", "--offline")
    assert not hub.asked
    run("verify", "me/made:Q8_0", HF_TOKEN=TOKEN)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_resumed_study_keeps_its_commits(hub: Hub, tmp_path: Path) -> None:
    first = hub.add("lab/student", files_of(STUDENT_MODEL))
    (tmp_path / "s.yaml").write_text("version: 1\nmodels: {s: lab/student}\nrecipes: {q: {type: Q8_0}}\n")
    assert bitsmith(hub, tmp_path, "study", "s.yaml", "-o", "out").returncode == 0
    hub.add("lab/student", files_of(STUDENT_MODEL) | {"config.json": b"{}"})
    done = bitsmith(hub, tmp_path, "study", "s.yaml", "-o", "out", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "commits.json").read_text()) == {"lab/student": first}
    report = (tmp_path / "out" / "report.json").read_text()
    assert f"lab/student@{first}" in report


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exit_codes_and_lines_of_the_command_line(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    for line, code, said in (
        (
            ("inspect", "org/none"),
            1,
            "error: org/none: no such file here, and as a model of a hub: the hub has none",
        ),
        (("inspect", "org/none", "--offline"), 1, "not in the cache"),
        (("push", "nothing.gguf", REPO), 1, "error: "),
    ):
        done = bitsmith(hub, tmp_path, *line)
        assert done.returncode == code
        assert said in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    hub.fail("GET /api/models", 429, headers={"Retry-After": "7200"}, times=99)
    done = bitsmith(hub, tmp_path, "inspect", REPO)
    assert done.returncode == 4
    assert "try again in 7200 seconds" in done.stderr


@pytest.mark.slow
def test_two_runs_share_a_download_and_a_killed_one_leaves_no_model(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, FILES | {"model.safetensors": save({"w": np.arange(3_000_000, dtype=np.float32)})})
    hub.fail("GET /storage", stall_seconds=0.5)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local(REPO))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert asked_for(hub, "/storage/") == [None]
    shutil.rmtree(constants.HF_HUB_CACHE)
    script = (
        "import os, signal, sys\nfrom bitsmith.store import hub\n"
        "hub.local('org/tiny', lambda s, done, n: os.kill(os.getpid(), signal.SIGKILL) "
        "if done > 5_000_000 else None)\n"
    )
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    killed = subprocess.run([sys.executable, "-c", script], env=env, check=False, capture_output=True)
    assert killed.returncode == -9
    storage = Path(constants.HF_HUB_CACHE) / "models--org--tiny"
    assert not list(storage.glob("snapshots/*/model.safetensors"))
    assert not (storage / "refs").exists()
    hub.asked.clear()
    assert git_sha((local(REPO) / "model.safetensors").read_bytes())
    assert asked_for(hub, "/storage/")[0] is not None

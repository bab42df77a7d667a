"""A hub on 127.0.0.1 that the real huggingface_hub client talks to: models, commits, uploads, and its faults.

Large files are sent by a second server, as a hub's are by its storage: their addresses hold no token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf", ".cellm", ".bin")
TOKEN = "hf_aTokenOfTheTests"  # noqa: S105


@dataclass
class Repo:
    """A model's repository: files by commit, commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD path` holds the pattern, `times` times."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    drop_after: int | None = None
    stall_seconds: float = 0.0
    body: bytes = b"{}"
    replaced: bytes | None = None
    ignores_range: bool = False


@dataclass
class Hub:
    """What the server holds, what it was asked, and what is to go wrong."""

    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    before: Callable[[str], None] | None = None
    lists_sizes: bool = True
    tags_by_git: bool = True
    url: str = ""
    storage_url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main", **kind: bool) -> str:
        """Commit files, which replace those of the branch, and return the commit."""
        with self.lock:
            found = self.repos.setdefault(repo, Repo(**kind))
            said = [repo, len(found.commits), sorted((name, git_sha(data)) for name, data in files.items())]
            commit = git_sha(json.dumps(said).encode())
            found.commits[commit] = dict(files)
            found.refs[revision] = commit
            for name, data in files.items():
                if name.endswith(LFS_SUFFIXES):
                    self.lfs[hashlib.sha256(data).hexdigest()] = data
            return commit

    def fail(self, pattern: str, status: int = 0, **how: Any) -> Fault:
        """Let something go wrong."""
        self.faults.append(Fault(pattern, status, **how))
        return self.faults[-1]

    def paths(self, method: str = "") -> list[str]:
        """Return what was asked, in order."""
        return [path for how, path, _ in self.asked if method in ("", how)]

    def fault(self, line: str) -> Fault | None:
        """Return what goes wrong with a request, and count it."""
        with self.lock:
            for one in self.faults:
                if one.times > 0 and re.search(one.pattern, line):
                    one.times -= 1
                    return one
        return None

    def resolve(self, repo: str, revision: str) -> str | None:
        """Return the commit of a revision."""
        found = self.repos[repo]
        return revision if revision in found.commits else found.refs.get(revision)


def git_sha(data: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.given = self.rfile.read(length)
        with self.hub.lock:
            self.hub.asked.append((self.command, path, dict(self.headers.items())))
        if self.hub.before is not None:
            self.hub.before(f"{self.command} {path}")
        self.wrong = self.hub.fault(f"{self.command} {path}")
        if self.wrong is not None and self.wrong.stall_seconds:
            time.sleep(self.wrong.stall_seconds)
        if self.wrong is not None and self.wrong.status:
            self._send(self.wrong.status, self.wrong.body, self.wrong.headers)
            return
        for pattern, act in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found is not None:
                self.query = parse_qs(parts.query)
                act(self, *found.groups())
                return
        self._send(404, headers={"X-Error-Message": f"no such page {path}"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        wrong = self.wrong
        if wrong is not None and wrong.replaced is not None and status in (200, 206):
            body = wrong.replaced
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if wrong is not None and wrong.drop_after is not None:
            self.wfile.write(body[: wrong.drop_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def _fail(self, status: int, message: str, code: str = "") -> None:
        self._send(status, headers={"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refused(self, repo: str, revision: str | None = None, *, writes: bool = False) -> str | None:
        """Answer with the hub's error where there is one; else return the commit."""
        found = self.hub.repos.get(repo)
        knows = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not knows):
            code = 404 if knows else 401
            self._send(
                code, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
            return None
        if writes and not knows:
            self._send(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        commit = self.hub.resolve(repo, revision or "main")
        if commit is None:
            self._send(
                404,
                headers={
                    "X-Error-Code": "RevisionNotFound",
                    "X-Error-Message": f"Invalid rev id: {revision}",
                },
            )
        return commit

    def _info(self, repo: str, revision: str | None) -> None:
        commit = self._refused(repo, revision)
        if commit is None:
            return
        found = self.hub.repos[repo]
        told = "blobs" in self.query and self.hub.lists_sizes
        files = [_sibling(name, data, told) for name, data in sorted(found.commits[commit].items())]
        told_of = {"private": found.private, "gated": "manual" if found.gated else False}
        self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": files, "tags": [], **told_of})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._refused(repo, revision)
        if commit is None:
            return
        if self.hub.repos[repo].gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            said = f"Access to model {repo} is restricted. You must be authenticated to access it."
            self._send(401, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": said})
            return
        data = self.hub.repos[repo].commits[commit].get(name)
        if data is None:
            self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name.endswith(LFS_SUFFIXES):
            sha = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha}"'}
            self._send(302, b"", headers | {"Location": f"{self.hub.storage_url}/storage/{sha}"})
        else:
            tag = git_sha(data) if self.hub.tags_by_git else hashlib.sha1(data).hexdigest()  # noqa: S324
            self._ranged(data, headers | {"ETag": f'"{tag}"'})

    def _storage(self, sha: str) -> None:
        self._ranged(self.hub.lfs[sha], {"ETag": f'"{sha}"'})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None or (self.wrong is not None and self.wrong.ignores_range):
            self._send(200, data, headers)
            return
        start = int(wanted[1])
        if start >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        said = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206, data[start:], headers | {"Content-Range": said})

    def _create(self) -> None:
        asked = json.loads(self.given)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        if status == 200:
            self.hub.add(
                repo,
                {".gitattributes": b"*.gguf filter=lfs\n"},
                private=bool(asked.get("private") or asked.get("visibility") == "private"),
            )
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, status)

    def _branch(self, repo: str, name: str) -> None:
        commit = self._refused(repo, writes=True)
        if commit is None:
            return
        found = self.hub.repos[repo]
        found.refs.setdefault(name, commit)
        self._json({})

    def _preupload(self, repo: str, revision: str) -> None:
        if self._refused(repo, revision, writes=True) is None:
            return
        files = json.loads(self.given)["files"]
        modes = [
            {"path": one["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if one["path"].endswith(LFS_SUFFIXES) else "regular"}
            for one in files
        ]  # fmt: skip
        self._json({"files": modes})

    def _batch(self, repo: str) -> None:
        if self._refused(repo, writes=True) is None:
            return
        objects = []
        for one in json.loads(self.given)["objects"]:
            there = one["oid"] in self.hub.lfs
            actions = {"upload": {"href": f"{self.hub.storage_url}/upload/{one['oid']}"}}
            objects.append({"oid": one["oid"], "size": one["size"]} | ({} if there else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, sha: str) -> None:
        if hashlib.sha256(self.given).hexdigest() != sha:
            self._send(400)
            return
        self.hub.lfs[sha] = self.given
        self._send(200)

    def _commit(self, repo: str, revision: str) -> None:
        parent = self._refused(repo, revision, writes=True)
        if parent is None:
            return
        lines = [json.loads(line) for line in self.given.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent):
            self._send(
                412, headers={"X-Error-Message": "A commit has happened since. Please refresh and try again."}
            )
            return
        files = dict(self.hub.repos[repo].commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        commit = self.hub.add(repo, files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _yaml(self) -> None:
        self._json({"errors": [], "warnings": []})


def _sibling(name: str, data: bytes, told: bool) -> dict[str, Any]:
    if not told:
        return {"rfilename": name}
    found = {"rfilename": name, "size": len(data), "blobId": git_sha(data)}
    if name.endswith(LFS_SUFFIXES):
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


_REPO = r"([^/ ]+/[^/ ]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler._info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([0-9a-f]{{40}}|refs/pr/\d+|[^/]+)/(.+)", _Handler._resolve),
    (r"(?:GET|HEAD) /storage/([0-9a-f]{64})", _Handler._storage),
    (r"POST /api/repos/create", _Handler._create),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler._branch),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler._preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /upload/([0-9a-f]{64})", _Handler._upload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler._commit),
    (r"POST /api/validate-yaml", _Handler._yaml),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub and its storage on 127.0.0.1 until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    how = {"poll_interval": 0.02}
    threads = [threading.Thread(target=one.serve_forever, kwargs=how, daemon=True) for one in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()

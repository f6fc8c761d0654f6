"""A Hugging Face hub of one machine: as much of its API as downloading and uploading models need.

`FakeHub` serves folders as commits, records every request, and takes commits; `support.client` asks it.

Written from the requests that huggingface_hub 2.4 makes with Xet storage switched off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_fake"
LARGE_FILES = (
    ".safetensors",
    ".bin",
)  # go through the large file protocol, as .gitattributes says on the hub


@dataclass
class Repository:
    """What the hub knows of one repository."""

    licence: str | None = None
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put these files as a branch's newest commit."""
        digest = hashlib.sha1(f"{branch}{len(self.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        sha = digest.hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass(eq=False)
class Refused(Exception):
    """An answer that isn't 200."""

    status: int
    code: str = ""


class FakeHub:
    """The server; a context manager that listens on a free port of 127.0.0.1.

    Attributes:
        repositories: "org/name" -> what it is; tests may change it at any time.
        requests: "METHOD /path" of everything asked so far.
        downloads: paths of the files whose content was sent.
        faults: part of "METHOD /path" -> the status that such requests are answered with.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.downloads: list[str] = []
        self.faults: dict[str, int] = {}
        self.large: dict[str, bytes] = {}  # uploaded, by SHA-256
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def add(self, repo: str, folder: Path, branch: str = "main", **facts: Any) -> str:
        """Serve a folder's present content as a commit; returns the commit."""
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        repository = self.repositories.setdefault(repo, Repository(**facts))
        return repository.commit(files, branch)

    def forget(self) -> None:
        """Forget what was asked so far."""
        self.requests.clear()
        self.downloads.clear()


class _Handler(BaseHTTPRequestHandler):
    """One request. Answers follow the hub's documented API and the headers that its client reads."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        try:
            for part, status in self.hub.faults.items():
                if part in asked:
                    raise Refused(status)
            for method, pattern, action in _ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    action(self, **match.groupdict())
                    return
            raise Refused(404)
        except Refused as refused:
            self._send(b"{}", refused.status, {"X-Error-Code": refused.code} if refused.code else {})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, data: object) -> None:
        self._send(json.dumps(data).encode())

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, repo: str, revision: str | None) -> tuple[Repository, str]:
        """The repository and the commit; strangers are told the same of private ones as of none."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._is_known):
            raise Refused(404 if self._is_known else 401, "RepoNotFound")
        revision = revision or "main"
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            raise Refused(404, "RevisionNotFound")
        return found, commit

    def show(self, repo: str, revision: str | None = None) -> None:
        found, commit = self._find(repo, revision)
        licence = {"license": found.licence} if found.licence else {}
        self._send_json({
            "id": repo, "sha": commit, "private": found.private, "gated": "auto" if found.gated else False,
            "tags": [f"license:{name}" for name in licence.values()], "cardData": licence,
            "siblings": [{"rfilename": path} for path in found.commits[commit]],
        })  # fmt: skip

    def tree(self, repo: str, revision: str) -> None:
        found, commit = self._find(repo, revision)
        entries: list[dict[str, Any]] = []
        for path, content in found.commits[commit].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LARGE_FILES):
                entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._send_json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found, commit = self._find(repo, revision)
        if found.gated and not self._is_known:
            raise Refused(401, "GatedRepo")
        if path not in found.commits[commit]:
            raise Refused(404, "EntryNotFound")
        content = found.commits[commit][path]
        if self.command == "GET":
            self.hub.downloads.append(path)
        self._send(content, headers={"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": commit})

    def create(self) -> None:
        self._need_token()
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        is_new = repo not in self.hub.repositories
        if is_new:
            self.hub.repositories[repo] = Repository()
            self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send(json.dumps({"url": f"{self.hub.url}/{repo}"}).encode(), 200 if is_new else 409)

    def check_card(self) -> None:
        """The hub parses the metadata, and refuses a base model that isn't named as its own are."""
        card = json.loads(self.body)["content"]
        base = re.search(r"^base_model: (.*)$", card.split("---\n")[1], re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1]):
            raise Refused(400)
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self._need_token()
        found, commit = self._find(repo, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            old = found.commits[commit].get(path)
            mode = "lfs" if path.endswith(LARGE_FILES) else "regular"
            oid = None if old is None else etag(path, old)
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def batch(self, repo: str) -> None:
        self._need_token()
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400)
        self.hub.large[oid] = self.body
        self._send(b"")

    def commit(self, repo: str, revision: str) -> None:
        self._need_token()
        found, before = self._find(repo, revision)
        files = dict(found.commits[before])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = found.commit(files, revision)
        self._send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def _need_token(self) -> None:
        if not self._is_known:
            raise Refused(401)


def etag(path: str, content: bytes) -> str:
    """What the hub compares a file by."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE_FILES) else git_hash(content)


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", rf"/api/models/{_REPO}", _Handler.show),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.show),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>.+)", _Handler.tree),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.check_card),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
]

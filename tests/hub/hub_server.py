"""A model hub on the loopback that answers as huggingface_hub 2.4 asks: revisions, trees, and files by HEAD and GET.

Small files are served by the hub itself; weights are redirected to another host, as large files are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")
PAGE = 3
"""Entries in one answer about a tree."""


@dataclass(slots=True)
class Repository:
    """Files by commit, and the commit of each branch and tag; `token` is who may read a gated one."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        """Add a commit, which `main` and other refs name from now on."""
        seed = b"".join(f"{path} {len(self.commits)}".encode() + data for path, data in files.items())
        sha = hashlib.sha1(seed).hexdigest()
        self.commits[sha] = dict(files)
        self.refs.update(dict.fromkeys(("main", *refs), sha))
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag or the start of a commit names."""
        starts = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return self.refs.get(revision, starts[0] if starts else None)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(slots=True)
class Fault:
    """What goes wrong with requests whose text, such as `HEAD /org/name/resolve/`, has a pattern."""

    pattern: str
    status: int | None = None
    cut: int | None = None
    """Close the connection after this many bytes of each answer."""
    slow: bool = False
    """Do not answer before the hub is closed."""
    times: int = 10**6


class Hub:
    """The hub's repositories, what it was asked, and what is to go wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.closing = Event()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: Mapping[str, bytes], *refs: str, token: str | None = None) -> str:
        """Add a commit to a repository and return its sha."""
        repository = self.repositories.setdefault(name, Repository())
        repository.token = token
        return repository.commit(files, *refs)

    def blob(self, sha256: str) -> bytes:
        files = (f for r in self.repositories.values() for c in r.commits.values() for f in c.values())
        return next(data for data in files if hashlib.sha256(data).hexdigest() == sha256)

    def fault(self, asked: Asked) -> Fault | None:
        """Return what goes wrong with this request, if anything."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, str(asked)):
                fault.times -= 1
                return fault
        return None

    def requests(self) -> list[str]:
        """Return what was asked since the last call."""
        asked, self.asked = self.asked, []
        return [str(request) for request in asked]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    cut: int | None = None

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2" and self.headers["Authorization"]:
            self.answer(200, {}, b'{"name": "me", "type": "user"}')
            return
        if re.match("/api/(?!models/|datasets/)", self.path):  # what huggingface_hub asks of its own accord
            self.answer(404)
            return
        asked = Asked(self.command, self.path, self.headers["Range"], self.headers["Authorization"])
        self.hub.asked.append(asked)
        if fault := self.hub.fault(asked):
            if fault.slow:
                self.hub.closing.wait(60)
                return
            if fault.status:
                self.answer(fault.status)
                return
            self.cut = fault.cut
        self.route(urlsplit(unquote(self.path)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Answer which of some paths a repository has, or take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        asked = Asked(self.command, self.path, None, self.headers["Authorization"])
        self.hub.asked.append(asked)
        if fault := self.hub.fault(asked):
            self.answer(fault.status or 500)
            return
        if (taken := self.take(unquote(self.path), body)) is not None:
            self.answer(200, {}, json.dumps(taken).encode(), always=True)
            return
        match = re.fullmatch("/api/(datasets/.+?)/paths-info/(.+)", unquote(self.path))
        if match is None or (found := self.repository(*match.groups())) is None:
            self.answer(404)
            return
        files = found[0].commits[found[1]]
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        page = [_entry(path, files[path]) for path in asked if path in files]
        self.answer(200, {}, json.dumps(page).encode(), always=True)

    def take(self, path: str, body: str) -> dict[str, Any] | None:
        """Make a repository, or a commit in it whose files come in one piece; None where something else is asked."""
        if path == "/api/validate-yaml":
            return {}
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            self.hub.repositories.setdefault(name, Repository())
            return {"url": f"{self.hub.endpoint}/{name}"}
        if match := re.fullmatch("/api/models/(.+?)/preupload/main", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            return {
                "files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        if match := re.fullmatch("/api/models/(.+?)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            sha = self.hub.add(match[1], files)
            return {"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{match[1]}/commit/{sha}"}
        return None

    def route(self, url: Any) -> None:
        match re.split("/(api/models|api(?=/datasets)|cdn|resolve)(?:/|$)", url.path):
            case ["", "api/models" | "api", what]:
                self.api(*re.fullmatch("(.+?)(?:/(revision|tree)/(.+))?", what).groups(), url.query)  # type: ignore
            case ["", "cdn", sha256]:
                self.send_file(self.hub.blob(sha256), {})
            case [name, "resolve", place]:
                self.resolve(name.removeprefix("/"), *place.split("/", 1))
            case _:
                self.answer(404)

    def repository(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """Return a repository and a commit of it; answer and return None where there is no such."""
        if new := self.hub.moved.get(name):
            self.answer(307, {"Location": self.path.replace(name, new)})
            return None
        repository = self.hub.repositories.get(name)
        if repository is None:  # the hub does not tell strangers which repositories there are
            status = 404 if self.headers["Authorization"] else 401
            self.answer(status, {"X-Error-Code": "RepoNotFound"})
            return None
        if (commit := repository.find(revision)) is None:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def api(self, name: str, what: str | None, revision: str | None, query: str) -> None:
        """Answer what a revision is, or a page of its tree, or of a folder in it."""
        revision, _, folder = (revision or "main").partition("/") if what == "tree" else (revision, "", "")
        if (found := self.repository(name, revision or "main")) is None:
            return
        repository, commit = found
        if what != "tree":
            files = [{"rfilename": path} for path in repository.commits[commit]]
            about = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": files}
            self.answer(200, {}, json.dumps(about).encode())
            return
        files = {
            path: data
            for path, data in repository.commits[commit].items()
            if f"/{path}".startswith(f"/{folder}")
        }
        if folder and not files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        start = int(parse_qs(query).get("cursor", ["0"])[0])
        kind = "" if name.startswith("datasets/") else "models/"
        rest = f"{self.hub.endpoint}/api/{kind}{name}/tree/{commit}?cursor={start + PAGE}"
        link = {"Link": f'<{rest}>; rel="next"'} if start + PAGE < len(files) else {}
        page = [_entry(path, data) for path, data in list(files.items())[start : start + PAGE]]
        self.answer(200, link, json.dumps(page).encode())

    def resolve(self, name: str, revision: str, path: str) -> None:
        """Answer what a file is, and for GET the file."""
        if (found := self.repository(name, revision)) is None:
            return
        repository, commit = found
        if repository.token and self.headers["Authorization"] != f"Bearer {repository.token}":
            status = 403 if self.headers["Authorization"] else 401
            self.answer(status, {"X-Error-Code": "GatedRepo"})
            return
        headers = {"X-Repo-Commit": commit}
        data = repository.commits[commit].get(path)
        if data is None:
            self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
            self.answer(302, headers | {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256}"})
        else:
            self.send_file(data, headers | {"ETag": f'"{_blob_id(data)}"'})

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])  # type: ignore
        if start:
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.answer(206 if start else 200, headers, data[start:])

    def answer(
        self, status: int, headers: Mapping[str, str] = {}, body: bytes = b"", *, always: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" or always:
            self.wfile.write(body if self.cut is None else body[: self.cut])

    def log_message(self, *_: object) -> None:
        pass


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry

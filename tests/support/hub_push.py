"""As much of the Hugging Face Hub's HTTP interface as its client needs to upload a model, in memory, on loopback."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_of_the_tests"
OWNER = "someone"


@dataclass
class Hub:
    """What the hub holds, and how it is to behave.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: files of each repository by name.
        private: names of the repositories that are.
        commits: the messages, in order.
        calls: method and path of each request.
        foreign: repositories that this token may not write.
        breaks: the request that fails: a part of its path.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    foreign: set[str] = field(default_factory=set)
    breaks: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Status and content of the answer to one request."""
        self.calls.append(f"{method} {path}")
        if self.breaks is not None and self.breaks in path:
            return 500, {"error": "out of order"}
        if blob := re.fullmatch(r"/blob/(\w+)", path):
            self.blobs[blob[1]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": OWNER, "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/(?:api/models/)?([\w-]+/[\w.-]+?)(?:\.git)?(/.*)?", path):
            return self._repository(found[1], found[2] or "", body)
        return 404, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if name in self.repositories:
            return 409, {"url": f"{self.url}/{name}", "error": "You already created this model repo"}
        if not name.startswith(f"{OWNER}/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.repositories[name] = {".gitattributes": b""}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(name)
        return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}

    def _repository(self, name: str, what: str, body: bytes) -> tuple[int, Any]:
        files = self.repositories.get(name)
        if files is None:
            return 404, {}
        if what == "/auth-check/write":
            return (403, {"error": "no right to write"}) if name in self.foreign else (200, {})
        if what == "":
            return 200, {"id": name, "sha": "a" * 40, "private": name in self.private, "siblings": []}
        if what.startswith("/tree/"):
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": "b" * 40} for file in files]
            return 200, entries
        if what.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in asked
                ]
            }
        if what == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    {**o, "actions": {"upload": {"href": f"{self.url}/blob/{o['oid']}", "header": {}}}} for o in objects
                ],
            }
        if what.startswith("/commit/"):
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 404, {}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = dict(self.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repositories[name] = files
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40, "success": True}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on loopback with one user, whose token is `TOKEN`."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = self._chunks()
            path = self.path.split("?")[0]
            status, content = hub.answer(self.command, path, body, self.headers.get("Authorization", ""))
            sent = json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(sent))}.items():
                self.send_header(key, value)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

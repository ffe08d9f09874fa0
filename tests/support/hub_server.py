"""As much of the Hugging Face Hub's HTTP interface as its client needs to load one public data set of JSONL files."""

from __future__ import annotations

import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serve(repository: str, files: dict[str, bytes], commit: str = "a" * 40) -> Iterator[str]:
    """Serve `files` as the data set `repository` on loopback; yields the address for HF_ENDPOINT."""
    entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "b" * 40} for name in files]
    described = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urllib.parse.unquote(self.path.split("?")[0])
            api = f"/api/datasets/{repository}"
            found = re.fullmatch(rf"/datasets/{repository}/resolve/\w+/(.+)", path)
            if found and found[1] in files:
                self.send(200, files[found[1]], {"ETag": f'"{commit}{found[1]}"', "X-Repo-Commit": commit})
            elif found:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            elif re.fullmatch(rf"{api}(/revision/\w+)?", path):
                self.send(200, json.dumps(described).encode(), {"Content-Type": "application/json"})
            elif path.startswith(f"{api}/tree/"):
                self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            else:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()

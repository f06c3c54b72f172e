"""A small model hub for tests, as a process: the routes of huggingface.co that huggingface_hub uses to look and to download.

    python tests/hub_server.py FOLDER PORT [--drop-after BYTES] [--refuse-after REQUESTS] [--claim FILE=SIZE]

FOLDER holds repositories as owner/name/files; `.card.json` is a repository's model card. Files of 1 kB and more are kept
as Git LFS keeps them: the listing has their sha256, and their bytes are redirected to. What was asked of the bytes is
appended to FOLDER/requests.log, a line `file start` each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE_BYTES = 1000
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<path>.*))?)?$")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    drop_after: int | None = None
    refuse_after: int | None = None
    claims: dict[str, int]
    served = 0

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _API.match(path):
            self._api(found["repo"], found["revision"], found["path"] or "", tree=found["what"] == "tree")
        elif found := _FILE.match(path):
            self._file(self.root / found["repo"] / found["file"], found["revision"], with_body=with_body)
        elif path.startswith("/bytes/"):
            self._bytes(self.root / path.removeprefix("/bytes/"), with_body=with_body)
        else:
            self._end(404)

    def _api(self, repo: str, revision: str | None, path: str, *, tree: bool) -> None:
        folder = self.root / repo
        if not folder.is_dir() or revision not in (None, "main", COMMIT):
            self._end(404, error="RevisionNotFound" if folder.is_dir() else "RepoNotFound")
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        told = [self._entry(path, path.relative_to(folder).as_posix()) for path in files]
        if tree:
            self._json(self._tree(told, path))
            return
        card = folder / ".card.json"
        card_data = json.loads(card.read_text()) if card.is_file() else None
        self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": told, "tags": [], "cardData": card_data})

    def _tree(self, told: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
        """What lies directly in `path`."""
        start = f"{path}/" if path else ""
        inside = [one for one in told if one["rfilename"].startswith(start)]
        names = {
            one["rfilename"][len(start) :].partition("/")[0] for one in inside if "/" in one["rfilename"][len(start) :]
        }
        folders = [{"type": "directory", "path": start + name, "oid": COMMIT} for name in sorted(names)]
        files = [one for one in inside if "/" not in one["rfilename"][len(start) :]]
        return folders + [
            {
                "type": "file",
                "path": one["rfilename"],
                "size": one["size"],
                "oid": one["blobId"],
                **({"lfs": {**one["lfs"], "oid": one["lfs"]["sha256"]}} if "lfs" in one else {}),
            }
            for one in files
        ]

    def _entry(self, path: Path, name: str) -> dict[str, Any]:
        size = self.claims.get(name, path.stat().st_size)
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": hashlib.sha1(name.encode()).hexdigest()}
        if path.stat().st_size >= _LARGE_BYTES:
            entry["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 134}
        return entry

    def _file(self, path: Path, revision: str, *, with_body: bool) -> None:
        if not path.is_file() or revision not in ("main", COMMIT):
            self._end(404, error="EntryNotFound")
            return
        large = path.stat().st_size >= _LARGE_BYTES
        etag = sha256(path) if large else hashlib.sha1(path.read_bytes()).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            # As on the real hub, bytes come from another host: the client asks this one for what they are.
            place = f"http://localhost:{self.server.server_port}/bytes/{path.relative_to(self.root).as_posix()}"
            size = str(path.stat().st_size)
            self._end(302, {**headers, "X-Linked-ETag": f'"{etag}"', "X-Linked-Size": size, "Location": place})
        else:
            self._send(path.read_bytes(), 200, headers, with_body=with_body)

    def _bytes(self, path: Path, *, with_body: bool) -> None:
        data, start = path.read_bytes(), 0
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(found[1])
            data = data[start : int(found[2]) + 1 if found[2] else None]
        if with_body:
            Hub.served += 1
            with (self.root / "requests.log").open("a") as log:
                log.write(f"{path.name} {start}\n")
        if self.refuse_after is not None and Hub.served > self.refuse_after:
            self._end(403)
            return
        whole = path.stat().st_size
        headers = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{whole}"} if "Range" in self.headers else {}
        self._send(data, 206 if headers else 200, headers, with_body=with_body)

    def _send(self, data: bytes, status: int, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        if self.drop_after is not None and len(data) > self.drop_after:
            self.wfile.write(data[: self.drop_after])
            self.wfile.flush()
            self.close_connection = True  # in the middle of the body
        else:
            self.wfile.write(data)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"}, with_body=True)

    def _end(self, status: int, headers: dict[str, str] | None = None, *, error: str | None = None) -> None:
        named = {"X-Error-Code": error, "X-Error-Message": error} if error else {}
        self._send(b"", status, {**(headers or {}), **named}, with_body=False)

    def log_message(self, *_: object) -> None:
        pass


@cache
def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--drop-after", type=int)
    parser.add_argument("--refuse-after", type=int)
    parser.add_argument("--claim", default="")
    options = parser.parse_args()
    Hub.root, Hub.drop_after, Hub.refuse_after = options.folder, options.drop_after, options.refuse_after
    name, _, size = options.claim.partition("=")
    Hub.claims = {name: int(size)} if name else {}
    ThreadingHTTPServer(("127.0.0.1", options.port), Hub).serve_forever()


if __name__ == "__main__":
    main()

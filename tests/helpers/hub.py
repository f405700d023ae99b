"""A local server with as much of the Hugging Face hub as `datasets` needs to load one data set, `org/tiny`."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serve the files of `folder` as the newest commit and as the tag `v1`. Yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            if re.fullmatch(rf"/api/datasets/org/tiny(/revision/({COMMIT}|v1))?", path):
                self.say({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            elif re.fullmatch(rf"/api/datasets/org/tiny/tree/{COMMIT}", path):
                entry = {"type": "file", "oid": "0" * 40}
                self.say([{**entry, "path": name, "size": (folder / name).stat().st_size} for name in names])
            elif (name := path.removeprefix(f"/datasets/org/tiny/resolve/{COMMIT}/")) in names:
                self.file((folder / name).read_bytes())
            else:
                kind = "EntryNotFound" if "/org/tiny/" in path else "RepoNotFound"
                self.answer(404, b"{}", {"X-Error-Code": kind})

        do_HEAD = do_GET

        def file(self, data: bytes) -> None:
            headers = {"ETag": '"0"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                begin, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
                self.answer(206, data[begin : end + 1], headers)
            else:
                self.answer(200, data, headers)

        def say(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

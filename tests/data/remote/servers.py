"""Servers of files for tests: a web server that can be slow, fail and cut answers short; an S3 store."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebServer:
    """Serves the files under ``folder``, in parts where asked for, and no listing.

    Attributes:
        url: its address.
        asked: (path, first byte, stop) of every GET.
        tags: whether it says the ETag of a file.
        missing: the status of what is not there: 403 where nothing may be listed.
        trouble: called with the number of the GET, from 0 on, and its path; says what goes wrong with the answer:
            "slow" (a second late), "fail" (status 503), "cut" (half of it, and the connection ends), "hang" (no answer
            for long),
            "short" (half of it, as if that was all), "whole" (the whole file, whatever was asked for), "refuse"
            (status 403) or None.
    """

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.trouble: Callable[[int, str], str | None] = lambda number, path: None
        self.over = threading.Event()
        self.tags, self.missing = True, 404
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(server.missing)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(path.stat().st_size))
                if server.tags:
                    self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

            def do_GET(self) -> None:
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(server.missing)
                    return
                content = path.read_bytes()
                start, stop = 0, len(content)
                if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    start, stop = int(found[1]), min(stop, int(found[2]) + 1) if found[2] else stop
                with lock:
                    number = len(server.asked)
                    server.asked.append((self.path, start, stop))
                trouble = server.trouble(number, self.path)
                if trouble == "slow":
                    server.over.wait(1)
                if trouble in ("fail", "refuse"):
                    self.send_error(503 if trouble == "fail" else 403)
                    return
                if trouble == "hang":
                    server.over.wait(60)
                    self.close_connection = True
                    return
                part = content if trouble == "whole" else content[start:stop]
                sent = part[: len(part) // 2] if trouble in ("cut", "short") else part
                self.send_response(206 if found and trouble != "whole" else 200)
                self.send_header("Content-Length", str(len(sent if trouble == "short" else part)))
                self.end_headers()
                self.wfile.write(sent)
                self.close_connection = trouble == "cut"

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 store of moto on loopback; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    for _ in range(200):
        host, port = server.get_host_and_port()
        if port:
            break
        time.sleep(0.05)
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()

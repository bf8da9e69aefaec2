"""A long-running Python server that lets snapd manage its heap: it keeps a dictionary and serves it by HTTP.

    snapd daemon &
    python3 server.py 8000
    curl http://127.0.0.1:8000/words/1234

While nobody asks, `snapd dump PID` takes the dictionary out of memory, and a request brings back what it touches. In
a notebook it is one line: `import snapd; cooperation = snapd.cooperate()`, and `cooperation.leave()` at the end.
"""

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

import snapd

WORDS = {number: f"word {number}, of {number % 97} and {number % 89}" for number in range(300_000)}


class Handler(BaseHTTPRequestHandler):
    """Answers GET /words/NUMBER."""

    def do_GET(self) -> None:
        """Look the word up."""
        _, _, number = self.path.rpartition("/words/")
        word = WORDS.get(int(number)) if number.isdigit() else None
        body = f"{word or 'there is no such word'}\n".encode()
        self.send_response(200 if word else 404)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        """Say nothing of each request."""


def stop(_number: int, _frame: FrameType | None) -> None:
    """Leave serve_forever(), and with it the `with` block."""
    raise KeyboardInterrupt


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; port 0 takes a free one."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    signal.signal(signal.SIGTERM, stop)
    # From here on a daemon may take this process's heap out of memory. When the block ends, all of it is back.
    with snapd.cooperate(), ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"pid {os.getpid()} serves http://127.0.0.1:{server.server_port}/words/NUMBER", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("good bye", flush=True)


if __name__ == "__main__":
    main()

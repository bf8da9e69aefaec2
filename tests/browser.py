"""Debian's chromium, headless and with its sandbox on, as an ordinary user; its tabs are told what to do by DevTools.

Owns the browser's processes, its profile, and the server of the pages, all on loopback. Knows nothing of snapd.
"""

import base64
import contextlib
import functools
import http.client
import http.server
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from tests.processes import ASK_S, REAP_S, HarnessError, ended, living, signal_group, wait_until
from tests.target import TARGETS
from tests.users import NOBODY

PAGE: Final = "tab.html"
START_S: Final = 60.0
ENV: Final = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
OPTIONS: Final = (
    "--headless",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=1040,700",
    "--remote-debugging-port=0",
)


def _as(uid: int) -> list[str]:
    """Return what runs a command as `uid`, and ends it when whoever has started it is killed."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--pdeathsig=KILL", "--"]


class DevTools:
    """One DevTools connection: a call, its reply, and the events that come in between."""

    def __init__(self, socket: ClientConnection) -> None:
        """Speak over a connection that somebody else ends."""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, *, timeout_s: float = ASK_S, **parameters: object) -> dict[str, Any]:
        """Return the result; HarnessError when it is an error, or comes too late, or never."""
        number = next(self._numbers)
        try:
            self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
            while (message := json.loads(self._socket.recv(timeout_s))).get("id") != number:
                self._events.append(message)
        except TimeoutError as error:
            raise HarnessError(f"DevTools gave no reply to {method} within {timeout_s:g} s") from error
        except (WebSocketException, OSError) as error:
            raise HarnessError(f"DevTools has ended the connection at {method}: {error}") from error
        if "error" in message:
            raise HarnessError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def events(self, until: str, *, timeout_s: float = ASK_S) -> list[dict[str, Any]]:
        """Wait for an event of that name and return all that came until then."""
        try:
            while not any(event.get("method") == until for event in self._events):
                self._events.append(json.loads(self._socket.recv(timeout_s)))
        except (TimeoutError, WebSocketException, OSError) as error:
            raise HarnessError(f"DevTools has not told of {until}: {error}") from error
        found, self._events = self._events, []
        return found


class Tab:
    """One page: what it computes, the process that renders it, and its picture."""

    def __init__(self, name: str, target: str, tools: DevTools, browser: "Browser") -> None:
        """Take over an open target of DevTools."""
        self.name = name
        self._target = target
        self._tools = tools
        self._browser = browser
        wait_until(lambda: self.evaluate("document.readyState") == "complete", f"the page of {name}")
        self.pid = self._find_pid()
        self.pidfd = os.pidfd_open(self.pid)

    def _find_pid(self) -> int:
        """Ask for a trace, which begins with the process of each frame; the browser knows it by its outer id."""
        self._tools.call("Tracing.start", traceConfig={"includedCategories": ["disabled-by-default-devtools.timeline"]})
        self._tools.call("Tracing.end")
        for event in self._tools.events("Tracing.tracingComplete"):
            for traced in event["params"].get("value", ()):
                if traced["name"] == "TracingStartedInBrowser":
                    return int(traced["args"]["data"]["frames"][0]["processId"])
        raise HarnessError(f"the trace of {self.name} names no process")

    @property
    def alive(self) -> bool:
        """Whether its renderer has not ended."""
        return not ended(self.pidfd, 0)

    def evaluate(self, expression: str, *, timeout_s: float = ASK_S) -> Any:
        """Return what an expression of the page comes to; HarnessError when it raises or takes too long."""
        reply = self._tools.call(
            "Runtime.evaluate", timeout_s=timeout_s, expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in reply:
            raise HarnessError(f"{self.name}: {expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def build(self, mib: int) -> int:
        """Have it make its heap; returns the checksum."""
        return int(self.evaluate(f"build({json.dumps(self.name)}, {mib})"))

    def sum(self) -> int:
        """Return the checksum over all that the page has."""
        return int(self.evaluate("sum()"))

    def mutate(self, round_: int) -> int:
        """Have it change a little everywhere; returns the new checksum."""
        return int(self.evaluate(f"mutate({round_})"))

    def switch_to(self) -> None:
        """Show it; all others are in the background then."""
        self._tools.call("Page.bringToFront")

    @property
    def hidden(self) -> bool:
        """Whether the page is in the background."""
        return bool(self.evaluate("document.visibilityState") == "hidden")

    def screenshot(self) -> bytes:
        """Return a picture of it, a PNG."""
        return base64.b64decode(self._tools.call("Page.captureScreenshot", format="png")["data"])

    def close(self, timeout_s: float = ASK_S) -> None:
        """Close it and wait for the end of its renderer."""
        self._browser.tools.call("Target.closeTarget", targetId=self._target)
        if not ended(self.pidfd, timeout_s):
            raise HarnessError(f"the renderer of {self.name} did not end within {timeout_s:g} s")


class Browser:
    """A browser with a fresh profile; a context manager, which leaves no process and no file behind."""

    def __init__(self, *, uid: int = NOBODY) -> None:
        """Start it as `uid`, and wait for DevTools."""
        self._stack = contextlib.ExitStack()
        self.tabs: list[Tab] = []
        try:
            self._start(uid)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, uid: int) -> None:
        home = Path(tempfile.mkdtemp(prefix="snapd-browser-"))
        self._stack.callback(shutil.rmtree, home, ignore_errors=True)
        os.chown(home, uid, uid)
        self._port = self._serve()
        profile, self._log = home / "profile", home / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*_as(uid), "chromium", *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
                env={**ENV, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        self._stack.callback(self._end)
        self._tools_port = wait_until(lambda: self._devtools_port(profile / "DevToolsActivePort"), "DevTools", START_S)
        version = self._get("/json/version")
        self.version = str(version["Browser"])
        self.tools = self._connect(version["webSocketDebuggerUrl"])

    def _serve(self) -> int:
        """Serve the pages on loopback; returns the port."""
        handler = functools.partial(_Pages, directory=str(TARGETS))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, name="pages")
        thread.start()

        def end() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        self._stack.callback(end)
        return server.server_address[1]

    def _devtools_port(self, file: Path) -> int | None:
        if self.process.poll() is not None:
            raise HarnessError(f"chromium exited with status {self.process.returncode}\n{self.log()}")
        with contextlib.suppress(OSError):
            lines = file.read_text().splitlines()
            return int(lines[0]) if len(lines) > 1 else None
        return None

    def _get(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._tools_port, timeout=ASK_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            reply: dict[str, Any] = json.loads(connection.getresponse().read())
            return reply

    def _connect(self, url: str) -> DevTools:
        return DevTools(self._stack.enter_context(connect(url, max_size=None, proxy=None, ping_interval=None)))

    def log(self) -> str:
        """Return what it has written to its standard error."""
        return self._log.read_text(errors="replace")

    def open(self, name: str) -> Tab:
        """Open a page of a site of its own, so that no other page shares its renderer."""
        url = f"http://{name}.localhost:{self._port}/{PAGE}"
        target = self.tools.call("Target.createTarget", url=url)["targetId"]
        tools = self._connect(f"ws://127.0.0.1:{self._tools_port}/devtools/page/{target}")
        tab = Tab(name, target, tools, self)
        self.tabs.append(tab)
        return tab

    def processes(self) -> dict[int, str]:
        """Return all its processes with their kind."""
        found = self.tools.call("SystemInfo.getProcessInfo")["processInfo"]
        return {int(one["id"]): str(one["type"]) for one in found}

    def close(self) -> None:
        """End it as a person does; its exit status must be 0."""
        self.tools.call("Browser.close")
        try:
            status = self.process.wait(ASK_S)
        except subprocess.TimeoutExpired as error:
            raise HarnessError(f"chromium did not end within {ASK_S:g} s\n{self.log()}") from error
        if status:
            raise HarnessError(f"chromium ended with status {status}\n{self.log()}")

    def _end(self) -> None:
        signal_group(self.process.pid, signal.SIGKILL)
        for tab in self.tabs:  # one that waits for a page does not see its browser's end
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(tab.pidfd, signal.SIGKILL)
            os.close(tab.pidfd)
        self.process.wait(REAP_S)
        wait_until(lambda: not living(self.process.pid), "the end of all of chromium", REAP_S)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is left of it; a test that failed shows what it wrote."""
        if error is not None:
            error.add_note(f"chromium wrote:\n{self.log()[-2000:]}")
        self._stack.close()


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Serves the page and says nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Drop it."""

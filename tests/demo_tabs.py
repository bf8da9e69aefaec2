"""`python -m tests.demo_tabs`: background tabs of a sandboxed chromium go to disk, and come back when they are shown.

Owns the story: a private daemon, a browser with three heavy pages, a dump of each while it is in the background, and
the way back, with the checksum over all that the page has. Exit status 0 means that every checksum was right.
"""

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from snapd import __version__
from snapd.cli import output
from snapd.errors import SnapdError
from tests.browser import Browser, Tab
from tests.harness import Daemon, HarnessError, rss_bytes

COLUMNS: Final = 80
NAMES: Final = ("sheet", "letter", "news")
MAX_DUMPS: Final = 4
WORTH: Final = 0.1
"""Of what a page's first dump moved: while the next one moves more than that, its collector is still at work."""


@dataclass(slots=True)
class Figures:
    """What one tab's trip to disk and back cost."""

    name: str
    rss_before_bytes: int
    rss_after_bytes: int
    moved_bytes: int
    stored_bytes: int
    dumps: int
    longest_stop_us: int
    resume_s: float = 0.0
    checksum_s: float = 0.0


def put_out(daemon: Daemon, tab: Tab, before_bytes: int) -> Figures:
    """Dump a tab in the background, again as long as its own collector brings much of it back."""
    reports = [daemon.dump(tab.pid)]
    while len(reports) < MAX_DUMPS and (len(reports) == 1 or reports[-1].moved_bytes > WORTH * reports[0].moved_bytes):
        reports.append(daemon.dump(tab.pid))
    session = daemon.wait_for_session(tab.pid)
    return Figures(
        tab.name,
        before_bytes,
        rss_bytes(tab.pid),
        reports[0].moved_bytes,
        session.stored_bytes,
        len(reports),
        max(report.longest_stop_us for report in reports),
    )


def bring_back(tab: Tab, figures: Figures, digest: int) -> None:
    """Switch to a tab, time its first answer and compare the checksum; HarnessError when that is another one."""
    began = time.monotonic()
    tab.switch_to()
    tab.evaluate("answer()")
    figures.resume_s = time.monotonic() - began
    if tab.sum() != digest:
        raise HarnessError(f"the checksum of {tab.name} is not what it was")
    figures.checksum_s = time.monotonic() - began


def demonstrate(mib: int, picture: Path, say: Callable[[str], None]) -> tuple[str, list[Figures]]:
    """Tell the whole story; returns the browser's version and the figures of each tab."""
    with Daemon() as daemon, Browser() as browser:
        say(f"{browser.version}, with its sandbox, opens {len(NAMES)} pages of {mib} MiB each")
        tabs = [browser.open(name) for name in NAMES]
        sums = [tab.build(mib) for tab in tabs]
        full = [rss_bytes(tab.pid) for tab in tabs]
        with daemon.client() as client:
            for tab in tabs:
                client.attach(tab.pid)
        browser.open("empty").switch_to()
        say("another tab is shown, and they go to disk")
        figures = [put_out(daemon, tab, before) for tab, before in zip(tabs, full, strict=True)]
        for tab, one, digest in zip(tabs, figures, sums, strict=True):
            say(f"somebody switches to {tab.name}, which brings back what is looked at")
            bring_back(tab, one, digest)
        session = daemon.wait_for_session(tabs[-1].pid)
        if session.bad_pages:
            raise HarnessError(f"{session.bad_pages} pages of {tabs[-1].name} could not be read back")
        tabs[-1].evaluate(f"show({json.dumps(_caption(figures[-1]))})")
        picture.write_bytes(tabs[-1].screenshot())
        say("the tabs are let go, and the browser ends")
        with daemon.client() as client:
            for tab in tabs:
                client.detach(tab.pid)
        browser.close()
        return browser.version, figures


def _caption(one: Figures) -> str:
    return (
        f"resident {output.size(one.rss_before_bytes)} before, {output.size(one.rss_after_bytes)} in the background; "
        f"answered after {output.duration(one.resume_s)}; checksum right"
    )


def table(figures: list[Figures]) -> Table:
    """Return the figures, one row a tab."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("tab", no_wrap=True)
    for title in ("RSS before", "after", "freed", "stored", "resume", "all checked"):
        shown.add_column(title, justify="right", no_wrap=True)
    for one in figures:
        shown.add_row(
            one.name,
            output.size(one.rss_before_bytes),
            output.size(one.rss_after_bytes),
            f"{100 * (1 - one.rss_after_bytes / one.rss_before_bytes):.0f}%",
            output.size(one.stored_bytes),
            output.duration(one.resume_s),
            output.duration(one.checksum_s),
        )
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo_tabs", description=__doc__)
    parser.add_argument("--mib", type=int, default=230, metavar="N", help="size of each page's heap (default: 230)")
    parser.add_argument(
        "--screenshot", type=Path, default=Path("tabs.png"), metavar="FILE", help="where to (default: tabs.png)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if options.mib < 1:
        parser.error("--mib must be 1 at least")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: leave nothing behind
    console = Console(highlight=False, width=COLUMNS)
    began = time.monotonic()

    def say(what: str) -> None:
        if not options.json:
            console.print(f"{time.monotonic() - began:5.1f} s  {what}", style="dim")

    try:
        version, figures = demonstrate(options.mib, options.screenshot, say)
    except (HarnessError, SnapdError, OSError) as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        print(f"demo-tabs: {error}\n{notes}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    duration_s = time.monotonic() - began
    if options.json:
        print(json.dumps({"ok": True, "duration_s": duration_s, "tabs": [asdict(one) for one in figures]}))
        return 0
    console.print()
    console.print(Text(f"snapd {__version__} on Linux {platform.release()}, {version}", style="bold"))
    console.print(table(figures))
    console.print(Text(f"Every checksum is as it must be; {output.duration(duration_s)} in all."))
    console.print(Text(f"The last tab, as it came back, is in {options.screenshot}."))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The report: one HTML file that needs nothing else, with plots and every figure.

Owns what is plotted. Knows nothing of how the figures came to be.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from snapd.bench import figures, plots, table
from snapd.bench.plots import Bar, Line

if TYPE_CHECKING:
    from snapd.bench.figures import Must, Row
    from snapd.bench.result import Result

STYLE: Final = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --dim: #667; --rule: #d8dde3;
  --a: #1f6feb; --b: #d1662b; --c: #6e7781; --good: #1a7f37; --bad: #b42318; --shade: #1f6feb18; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --dim: #98a2ad; --rule: #333a42;
  --a: #6ea8fe; --b: #f0945d; --c: #8b949e; --good: #56d364; --bad: #ff7b72; --shade: #6ea8fe22; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
p { margin: .4rem 0; max-width: 46rem } .dim { color: var(--dim) }
svg { display: block; width: 100%; max-width: 45rem; height: auto; margin: .6rem 0 }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
svg .grid { stroke: var(--rule); stroke-width: 1 } svg .shade { fill: var(--shade) }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
svg polyline.a, svg .key.a { stroke: var(--a) } svg polyline.b, svg .key.b { stroke: var(--b) }
svg polyline.c, svg .key.c { stroke: var(--c) } svg .key { stroke-width: 3 }
svg rect.a { fill: var(--a) } svg rect.b { fill: var(--b) } svg rect.c { fill: var(--c) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; white-space: nowrap }
th { border-bottom: 1px solid var(--ink) }
td.n, th.n { text-align: right } tr.first td { border-top: 1px solid var(--rule) }
.ok { color: var(--good) } .no { color: var(--bad); font-weight: 600 }
"""

_THROUGHPUT: Final = (
    ("dump", "dump_mb_s", None),
    ("restore", "restore_mb_s", None),
    ("touch of all, random", "random_all_s", "heap"),
    ("touch of all, in order", "sequential_all_s", "heap"),
)
_LIMITS: Final = {"dump_mb_s": ("compress_mb_s", "zstd alone"), "restore_mb_s": ("decode_mb_s", "decode alone"),
                  "random_all_s": ("copy_page_all_s", "COPY alone"),
                  "sequential_all_s": ("copy_bulk_all_s", "COPY alone")}  # fmt: skip
_TOUCHES: Final = {"sparse": "touches of 2% of the heap", "random": "touches of the whole heap in random order",
                   "set": "touches of the working set, the second time"}  # fmt: skip


def render(result: Result) -> str:
    """Return the file's text."""
    head, *machine = table.heading(result)
    sections = [_throughput(result), *(_latency(result, name) for name in _TOUCHES), _stall(result), _figures(result)]
    verified = "" if result.digest is None else f" Every byte was verified at the end: digest {result.digest}."
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>snapd bench, {escape(result.machine.date)}</title>\n<style>\n{STYLE}</style></head>\n<body>"
        f"<h1>snapd bench</h1>\n<p>{escape(head)}</p>\n"
        f'<p class="dim">{"<br>".join(escape(line) for line in machine)}</p>\n'
        f"{''.join(filter(None, sections))}"
        f'<h2>Method</h2>\n<p class="dim">{escape(table.method(result) + verified)}</p>\n</body></html>\n'
    )


def _section(heading: str, text: str, plot: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n{plot}\n"


def _throughput(result: Result) -> str:
    groups = []
    heap_mb = (result.plan.mib << 20) / 1e6
    kernel = result.kernel_label or "kernel"
    for title, key, of in _THROUGHPUT:
        limit, limit_title = _LIMITS[key]
        group = []
        for samples, at, name, colour in (
            (result.figures, key, f"{title}: snapd", "a"),
            (result.kernel, key, kernel, "b"),
            (result.limits, limit, limit_title, "c"),
        ):
            if at in samples and key in result.figures:
                rate = heap_mb / samples.median(at) if of else samples.median(at)
                group.append(Bar(name, colour, rate, f"{table.number(rate)} MB/s"))
        if group:
            groups.append(group)
    if not groups:
        return ""
    return _section("Throughput", "MB/s, medians; more is better.", plots.bars("Throughput in MB/s", groups))


def _latency(result: Result, name: str) -> str:
    lines = []
    for side, label, colour in (("snapd", "snapd", "a"), ("kernel", result.kernel_label or "kernel", "b")):
        counts = sorted(result.pictures.histograms.get(f"{side}_{name}", {}).items())
        total, done, points = sum(count for _, count in counts), 0, []
        for upper_ns, count in counts:
            done += count
            points.append((upper_ns / 1e3, done / total))
        if points:
            lines.append(Line(label, colour, points))
    if not lines:
        return ""
    text = "Share of the touches that took at most so long, all rounds together. Further left is better."
    return _section(f"Latency: {_TOUCHES[name]}", text, plots.distribution(f"Latency of {_TOUCHES[name]}", lines))


def _stall(result: Result) -> str:
    found = result.pictures.series
    if "snapd" not in found:
        return ""
    labels = (("quiet", "without a dump", "c"), ("kernel", f"{result.kernel_label or 'kernel'}, page-out", "b"),
              ("snapd", "during a dump", "a"))  # fmt: skip
    lines = [
        Line(label, colour, [(at * found[key].step_s, ms) for at, ms in enumerate(found[key].latest_ms)])
        for key, label, colour in labels
        if key in found
    ]
    text = "The latest operation in each 240th of the time, in the last round; the dump is shaded. Lower is better."
    plot = plots.over_time("How late the operations of a busy program were", lines, found["snapd"].dump_s)
    return _section("A busy program during a dump", text, plot)


def _figures(result: Result) -> str:
    rows = []
    for group in figures.groups(result):
        shown = [row for row in group if row.key in result.figures]
        for index, row in enumerate(shown):
            rows += _cells(row, result, first=index == 0)
    titles = ("median", "least", "most", "beside")
    head = "<th>figure, unit</th>" + "".join(f'<th class="n">{one}</th>' for one in titles)
    return (
        f'<h2>All figures</h2>\n<div class="wide"><table><tr>{head}<th>which is</th><th>must</th></tr>\n'
        f"{''.join(rows)}</table></div>\n"
    )


def _cells(row: Row, result: Result, *, first: bool) -> list[str]:
    found = result.figures
    values = [f(row.key) * row.scale for f in (found.median, found.lowest, found.highest)]
    beside = [one for one in row.beside if one.key in one.samples(result)]
    lines: list[tuple[str, str, Must | None]] = [
        (table.number(one.samples(result).median(one.key)), one.title, one.must) for one in beside
    ]
    if row.must is not None or not lines:
        lines.insert(0, ("", "", row.must))
    cells = [escape(row.title), *(table.number(value) for value in values)]
    rendered = []
    for value, title, must in lines:
        numbers = "".join(f'<td class="n">{one}</td>' for one in (*cells[1:], value))
        rendered.append(
            f"<tr{' class=first' if first else ''}><td>{cells[0]}</td>{numbers}<td>{escape(title)}</td>"
            f"<td>{_verdict(must, result, values[0])}</td></tr>\n"
        )
        cells, first = [""] * 4, False
    return rendered


def _verdict(must: Must | None, result: Result, value: float) -> str:
    judged = must.verdict(result, value) if must is not None and result.plan.kernel else None
    if must is None or judged is None:
        return ""
    bound, kept = judged
    sign = "&le;" if must.at_most else "&ge;"
    text = f"{sign} {table.number(bound)}: {'reached' if kept else 'not reached'} ({escape(must.why)})"
    return f'<span class="{"ok" if kept else "no"}">{text}</span>'

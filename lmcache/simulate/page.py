"""A printable HTML report for capacity planning: a chart of hit rate over capacity, the numbers, and their assumptions.

No scripts, no downloads. Lines differ in dashes and markers as well as in colour, for black-and-white printers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lmcache.simulate.run import ADMISSIONS, BOUNDS, PLACES, Result

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _LEGEND = 760, 380, 60, 20, 64, 170
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito (2008)
_DASHES = ("", "8 3", "2 3", "8 3 2 3", "14 3", "5 5", "1 2")
_LINE = 15
_NOTES = (
    "Hit %: chunks found in the longest cached prefix of each prompt, as a share of all chunks of all prompts; tokens %: the "
    "same in prompt tokens, of which the last is always computed; requests %: requests with at least one hit.",
    "Prefill saved: estimated from the model's shape and the device's data sheet, unless a measured rate was given. p50, p99: "
    "time to first token; prompts are served in order of arrival, each alone, by the first free engine. Use the numbers to "
    "compare rows, not as absolute predictions.",
)
_BOUND_NOTE = (
    "In italics: baselines that are not policies of the cache. infinite keeps everything; optimum knows the future; "
    "lru-textbook is LRU over independent chunks. They have a single tier, as large as all tiers together, and write nothing."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
h1 { font-size: 1.5rem; margin-bottom: .5rem }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
svg { width: 100%; height: auto }
dl { display: grid; grid-template-columns: max-content 1fr max-content 1fr; gap: .1rem 1rem; margin: 0 }
dt { color: #555 }
dd { margin: 0; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
tr.first td { border-top: 2px solid #888 }
tr.bound td { color: #555; font-style: italic }
td.best { font-weight: bold }
.notes { color: #444; font-size: .85em }
@page { margin: 15mm }
@media print {
  body { margin: 0; max-width: none; font-size: 10px }
  svg { max-height: 95mm }
  tr, svg, dl { break-inside: avoid }
  thead { display: table-header-group }
  td, th { padding: .1rem .3rem }
}
"""


def page(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Returns the HTML. `about`: facts on the trace and the setup; keys it does not know are ignored."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(_title(about))}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(_title(about))}</h1>{_facts(about, results)}"
        f"<h2>Hit rate over capacity</h2>{_chart(results)}"
        f"<h2>Figures</h2>{_table(about, results)}{_notes(results)}</body></html>\n"
    )


def size(nbytes: float) -> str:
    """Formats bytes, e.g. `1.50 GiB`: three digits, in the largest unit that gives a number of at least 1."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while nbytes >= 1024 and len(units) > 1:
        nbytes /= 1024
        units.pop(0)
    unit = units[0]
    return f"{nbytes:,.{0 if nbytes >= 100 or unit == 'B' else 1 if nbytes >= 10 else 2}f} {unit}"


def _title(about: Mapping[str, Any]) -> str:
    return f"Cache capacity: {about['trace']}" if about.get("trace") else "Cache capacity"


def _facts(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    known = {
        "requests": ("requests", "{:,}"),
        "accesses": ("chunks requested", "{:,}"),
        "distinct_chunks": ("distinct chunks", "{:,}"),
        "chunk_tokens": ("tokens per chunk", "{:,}"),
        "skipped_lines": ("bad lines skipped", "{:,}"),
        "model": ("model", "{}"),
        "device": ("device", "{}"),
    }
    facts = [(label, form.format(about[key])) for key, (label, form) in known.items() if about.get(key)]
    chunk = about.get("chunk_bytes")
    if chunk:
        facts.append(("KV per chunk", size(chunk)))
        if about.get("distinct_chunks"):
            facts.append(("KV of all distinct chunks", size(chunk * about["distinct_chunks"])))
    if results:
        facts.append(("engines", f"{results[0].servers:,}"))
        facts.append(("prefill without a cache", f"{results[0].prefill_s + results[0].prefill_saved_s:,.0f} s"))
    admit = about.get("admit")
    if admit in ADMISSIONS and any("disk" in r.capacities for r in results):
        facts.append(("written to disk", ADMISSIONS[admit]))
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts) + "</dl>"


def _table(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    places = [place for place in PLACES if any(place in r.capacities for r in results if r.policy not in BOUNDS)]
    disk = "disk" in places
    chunk = about.get("chunk_bytes", 0)
    titles = ["policy", *places, "hit %", "tokens %", "requests %", "prefill saved", "p50 s", "p99 s", "loaded"]
    titles += ["disk written"] if disk else []
    best: dict[int, float] = {}
    for r in results:
        if r.policy not in BOUNDS:
            best[r.capacity_bytes] = max(best.get(r.capacity_bytes, 0.0), r.hit_rate)
    rows = []
    before: int | None = None
    for r in results:
        bound = r.policy in BOUNDS
        room = [size(r.capacities[place] * chunk) if place in r.capacities and not bound else "" for place in places]
        if bound and room:
            room[places.index("dram") if "dram" in places else 0] = size(r.capacity_bytes)
        top = not bound and r.hit_rate == best[r.capacity_bytes]
        total = r.prefill_s + r.prefill_saved_s
        cells = [
            *(f"<td>{text}</td>" for text in (f"{escape(r.policy)}", *room)),
            f"<td{' class=best' if top else ''}>{100 * r.hit_rate:.2f}</td>",
            *(f"<td>{100 * rate:.2f}</td>" for rate in (r.hit_rate_tokens, r.hit_rate_requests)),
            f"<td>{100 * r.prefill_saved_s / total if total else 0:.1f} %</td>",
            f"<td>{r.ttft_p50_s:.3f}</td><td>{r.ttft_p99_s:.3f}</td>",
            f"<td>{size(sum(r.bytes_loaded.values()))}</td>",
        ]
        if disk:
            cells.append(f"<td>{'' if bound else size(r.disk_written_bytes)}</td>")
        starts = before is not None and not bound and r.capacity_bytes != before
        before = before if bound else r.capacity_bytes
        kinds = " ".join(kind for kind, is_so in (("first", starts), ("bound", bound)) if is_so)
        rows.append(f'<tr class="{kinds}">' + "".join(cells) + "</tr>" if kinds else "<tr>" + "".join(cells) + "</tr>")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _notes(results: Sequence[Result]) -> str:
    notes = [*_NOTES, *([_BOUND_NOTE] if any(r.policy in BOUNDS for r in results) else [])]
    return '<div class="notes">' + "".join(f"<p>{escape(note)}</p>" for note in notes) + "</div>"


def _chart(results: Sequence[Result]) -> str:
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        if r.policy != "infinite":
            lines.setdefault(r.policy, []).append((r.capacity_bytes, 100 * r.hit_rate))
    limit = next((100 * r.hit_rate for r in results if r.policy == "infinite"), None)
    sizes = sorted({nbytes for points in lines.values() for nbytes, _ in points})
    if not sizes:
        return ""
    top = max([5.0, *(rate for points in lines.values() for _, rate in points), limit or 0.0]) * 1.1
    low, high = math.log(sizes[0]), math.log(max(sizes[-1], sizes[0] + 1))
    right, bottom = _WIDTH - _LEGEND, _HEIGHT - _BOTTOM

    def x(nbytes: int) -> float:
        share = 0.5 if len(sizes) == 1 else (math.log(nbytes) - low) / (high - low)
        return _LEFT + share * (right - _LEFT)

    def y(rate: float) -> float:
        return bottom - rate / top * (bottom - _TOP)

    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="hit rate over capacity" font-size="12">']
    step = next(s for s in (1, 2, 5, 10, 20) if top / s <= 8 or s == 20)
    for rate in range(0, int(top) + 1, step):
        out.append(f'<path d="M{_LEFT} {y(rate):.1f}H{right}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate} %</text>')
    last = -math.inf
    for nbytes in sizes:
        out.append(f'<path d="M{x(nbytes):.1f} {bottom}v5" stroke="#888"/>')
        if x(nbytes) - last >= 60:  # otherwise the labels would overlap
            last = x(nbytes)
            out.append(f'<text x="{last:.1f}" y="{bottom + 20}" text-anchor="middle">{size(nbytes)}</text>')
    middle = (_LEFT + right) / 2
    out.append(f'<text x="{middle}" y="{bottom + 42}" text-anchor="middle">capacity of all tiers (log scale)</text>')
    labels = []
    if limit is not None:
        out.append(f'<path d="M{_LEFT} {y(limit):.1f}H{right}" stroke="#888" stroke-dasharray="4 4"/>')
        labels.append((y(limit), f"infinite {limit:.1f} %", "#555"))
    for i, (name, points) in enumerate(lines.items()):
        colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
        points = sorted(points)
        path = " ".join(f"{x(nbytes):.1f},{y(rate):.1f}" for nbytes, rate in points)
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        out.append(f'<polyline points="{path}" fill="none" {style}/>')
        out += [_mark(i, x(nbytes), y(rate), colour) for nbytes, rate in points]
        labels.append((y(points[-1][1]), f"{name} {points[-1][1]:.1f} %", colour))
    for at, (wanted, text, colour) in zip(_apart([at for at, _, _ in sorted(labels)]), sorted(labels), strict=True):
        out.append(f'<path d="M{right + 5} {wanted:.1f}L{right + 14} {at:.1f}" stroke="{colour}"/>')
        out.append(f'<text x="{right + 18}" y="{at + 4:.1f}" fill="{colour}">{escape(text)}</text>')
    return "".join([*out, "</svg>"])


def _mark(i: int, x: float, y: float, colour: str) -> str:
    """Returns a marker (disc, square, triangle or diamond), so that lines can be told apart without colour."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>',
        f'<path d="M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z" fill="{colour}"/>',
        f'<path d="M{x:.1f} {y - 4.2:.1f}l4.2 7.2h-8.4z" fill="{colour}"/>',
        f'<path d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z" fill="{colour}"/>',
    )
    return shapes[i % len(shapes)]


def _apart(wanted: Sequence[float]) -> list[float]:
    """Returns label positions close to `wanted` (ascending), at least one line apart, inside the chart if they fit."""
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + _LINE) if placed else y)
    floor = float(_HEIGHT - _BOTTOM)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], floor)
        floor = placed[i] - _LINE
    return placed

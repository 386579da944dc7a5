"""One page for a capacity planner: hit rate over capacity as a drawing, and the figures as a table. No scripts, no downloads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lmcache.simulate.run import Result

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 380, 60, 50
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito (2008)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
@media print { body { margin: 0; font-size: 11px } }
"""


def page(about: Mapping[str, Any], results: Sequence[Result]) -> str:
    """HTML."""
    facts = ", ".join(f"{escape(str(key)).replace('_', ' ')} {escape(str(value))}" for key, value in about.items())
    head = (
        "policy",
        "capacity GiB",
        "hit %",
        "tokens %",
        "requests %",
        "prefill saved s",
        "p50 s",
        "p99 s",
        "disk GiB written",
    )
    rows = "".join(
        f"<tr><td>{escape(r.policy)}</td>"
        + "".join(
            f"<td>{value}</td>"
            for value in (
                f"{r.capacity_bytes / 2**30:.1f}",
                *(f"{100 * rate:.2f}" for rate in (r.hit_rate, r.hit_rate_tokens, r.hit_rate_requests)),
                f"{r.prefill_saved_s:.0f}",
                f"{r.ttft_p50_s:.3f}",
                f"{r.ttft_p99_s:.3f}",
                f"{r.disk_written_bytes / 2**30:.1f}",
            )
        )
        + "</tr>"
        for r in results
    )
    titles = "".join(f"<th>{title}</th>" for title in head)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Cache capacity</title><style>{_STYLE}</style>'
        f"<h1>Hit rate over capacity</h1><p>{facts}</p>{_chart(results)}"
        f"<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></html>\n"
    )


def _chart(results: Sequence[Result]) -> str:
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        if r.policy != "infinite":
            lines.setdefault(r.policy, []).append((r.capacity_bytes, 100 * r.hit_rate))
    limit = next((100 * r.hit_rate for r in results if r.policy == "infinite"), None)
    sizes = sorted({size for points in lines.values() for size, _ in points})
    if not sizes:
        return ""
    top = max([5.0, *(rate for points in lines.values() for _, rate in points), limit or 0.0]) * 1.1
    low, high = math.log(sizes[0]), math.log(max(sizes[-1], sizes[0] + 1))
    right = _WIDTH - 140

    def x(size: int) -> float:
        return _LEFT + (math.log(size) - low) / (high - low) * (right - _LEFT)

    def y(rate: float) -> float:
        return _HEIGHT - _BOTTOM - rate / top * (_HEIGHT - _BOTTOM - 20)

    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="hit rate over capacity" font-size="12">']
    step = next(s for s in (1, 2, 5, 10, 20) if top / s <= 8 or s == 20)
    for rate in range(0, int(top) + 1, step):
        out.append(f'<path d="M{_LEFT} {y(rate):.1f}H{right}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate} %</text>')
    out += [f'<text x="{x(s):.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{s / 2**30:.4g}</text>' for s in sizes]
    out.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">capacity, GiB (log)</text>')
    if limit is not None:
        out.append(f'<path d="M{_LEFT} {y(limit):.1f}H{right}" stroke="#888" stroke-dasharray="4 4"/>')
        out.append(f'<text x="{right + 6}" y="{y(limit) - 6:.1f}" fill="#666">infinite {limit:.1f}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{x(size):.1f},{y(rate):.1f}" for size, rate in sorted(points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(s):.1f}" cy="{y(r):.1f}" r="3" fill="{colour}"/>' for s, r in points]
        out.append(f'<text x="{right + 6}" y="{_HEIGHT / 2 + 16 * i:.1f}" fill="{colour}">{escape(name)}</text>')
    return "".join([*out, "</svg>"])

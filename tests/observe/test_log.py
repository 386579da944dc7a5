"""Log lines stay on one line, contain all fields, and are rate-limited."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.observe import log


def test_a_line_is_an_event_and_its_fields() -> None:
    line = log.render(
        "object-corrupt", {"tier": "disk", "chain": b"\xab\xcd", "took_s": 0.123456789, "why": 'bad "x"\n', "n": 3}
    )
    assert line == 'object-corrupt tier=disk chain=abcd took_s=0.123457 why="bad \\"x\\"\\n" n=3'
    assert log.render("e", {"empty": "", "none": None}) == 'e empty="" none=None'


@given(st.dictionaries(st.from_regex("[a-z_]+", fullmatch=True), st.text()))
@settings(max_examples=200, deadline=None)
def test_no_value_breaks_the_line_or_escapes_its_quotes(fields: dict[str, str]) -> None:
    line = log.render("event", dict(fields))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    rest = line.removeprefix("event")
    for key in fields:  # a quoted value ends at the first unescaped quote, so a parser finds exactly these keys
        rest = rest.removeprefix(f" {key}=")
        if rest.startswith('"'):
            end = 1
            while rest[end] != '"':
                end += 2 if rest[end] == "\\" else 1
            rest = rest[end + 1 :]
        else:
            rest = rest[len(rest.split(" ", 1)[0]) :]
    assert rest == ""


def test_levels_are_kept_and_off_levels_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmcache"):
        log.info("started", tier="disk")
        log.event(logging.DEBUG, "detail")
        log.warning("disk-full", path="/x y")
    assert [(r.levelname, r.message, r.name) for r in caplog.records] == [
        ("WARNING", 'disk-full path="/x y"', "lmcache")
    ]
    assert caplog.records[0].filename == "test_log.py"
    with caplog.at_level(logging.DEBUG, "lmcache"):
        log.info("started")
        log.event(logging.DEBUG, "detail")
    assert [r.message for r in caplog.records[1:]] == ["started", "detail"]


def test_a_throttle_holds_back_and_says_how_often() -> None:
    throttle = log.Throttle(every=10.0)
    assert throttle.allow("full", now=0.0) == 0
    assert throttle.allow("full", now=5.0) is None
    assert throttle.allow("full", now=9.0) is None
    assert throttle.allow("full", "other", now=9.0) == 0
    assert throttle.allow("full", now=10.0) == 2
    assert throttle.allow("full", now=30.0) == 0


def test_a_throttle_without_end_says_a_thing_once(caplog: pytest.LogCaptureFixture) -> None:
    throttle = log.Throttle(every=float("inf"))
    for reason in ("a", "a", "b", "a"):
        throttle.warning("uncached", key=reason, reason=reason)
    assert [r.message for r in caplog.records] == ["uncached reason=a", "uncached reason=b"]


def test_a_throttle_tells_repeats_in_the_line(caplog: pytest.LogCaptureFixture) -> None:
    throttle = log.Throttle(every=-1.0)
    throttle.warning("late")
    throttle._logged["late", None] = (0.0, 4)
    throttle.warning("late", op="load")
    assert [r.message for r in caplog.records] == ["late", "late op=load repeated=4"]


def test_a_throttle_forgets_the_oldest_beyond_its_limit() -> None:
    throttle = log.Throttle(every=100.0, limit=2)
    assert [throttle.allow("e", key, now=1.0) for key in "abc"] == [0, 0, 0]
    assert throttle.allow("e", "c", now=2.0) is None
    assert throttle.allow("e", "a", now=2.0) == 0
    assert len(throttle._logged) == 2

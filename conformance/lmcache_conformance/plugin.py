"""The pytest plugin: levels, claims, known failures, reproduction commands, and the report that the runner reads.

It is loaded in every pytest run of an environment in which the package is installed, so it does nothing to tests that
carry none of its marks, and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_conformance.runner.marks import LEVEL, REQUIRES
from lmcache_conformance.runner.seeds import known_seed, seed_of

if TYPE_CHECKING:
    from lmcache_conformance.runner.xfails import Xfail

# Suites are subclassed in other packages' test modules; their asserts are rewritten there too, for readable failures.
pytest.register_assert_rewrite(
    *(f"lmcache_conformance.{package}" for package in ("suites", "labs", "engines", "targets", "mutants"))
)

_XFAILS = pytest.StashKey[list["Xfail"]]()
_UNUSED = pytest.StashKey[list["Xfail"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our options; none of them has an effect unless given."""
    group = parser.getgroup("lmcache", "LMCache conformance")
    group.addoption(
        "--lmcache-adapter", metavar="NAME", help="Engine adapter under test: entry point or module:attribute."
    )
    group.addoption("--lmcache-budget", choices=("quick", "full"), help="How thorough the suites are [quick].")
    group.addoption("--lmcache-level", metavar="A,B", help="Run only tests of these levels.")
    group.addoption("--lmcache-xfails", metavar="FILE", help="Known failures, each with a link to its issue.")
    group.addoption(
        "--lmcache-report", metavar="FILE", help="Append JSON lines: one per test begun, one per test ended."
    )
    group.addoption("--lmcache-resume", action="store_true", help="Leave out tests that the report has already.")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marks known; read the files that options name."""
    config.addinivalue_line("markers", f"{LEVEL}(name): what this test proves, see lmcache_conformance.contract.Level")
    config.addinivalue_line("markers", f"{REQUIRES}(*capabilities): skipped unless the class under test claims them")
    if config.option.lmcache_xfails:
        from lmcache_conformance.runner.xfails import XfailError, read_xfails

        try:
            config.stash[_XFAILS] = read_xfails(Path(config.option.lmcache_xfails))
        except XfailError as error:
            raise pytest.UsageError(str(error)) from None
    if config.option.lmcache_report:
        from lmcache_conformance.runner.recorder import Recorder

        path = Path(config.option.lmcache_report)
        recorder = Recorder(path, resume=config.option.lmcache_resume)
        config.pluginmanager.register(recorder, Recorder.NAME)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the wanted levels, mark what is not claimed and what is known to fail."""
    if config.option.lmcache_level:
        _keep(config, items, _wanted_levels(config.option.lmcache_level))
    ours = [item for item in items if level_of(item) is not None]
    if ours:
        from lmcache_conformance.runner.capability_skips import apply_claims

        apply_claims(config, ours)
    if xfails := config.stash.get(_XFAILS, None):
        config.stash[_UNUSED] = _expect_failures(xfails, items)


def _wanted_levels(text: str) -> set[str]:
    from lmcache_conformance.contract import Level
    from lmcache_conformance.runner.discover import nearest

    wanted = {name.strip() for name in text.split(",")}
    known = [level.value for level in Level]
    for name in sorted(wanted.difference(known)):
        raise pytest.UsageError(f"no level is called {name!r}{nearest(name, known)} There are: {', '.join(known)}")
    return wanted


def _keep(config: pytest.Config, items: list[pytest.Item], levels: set[str]) -> None:
    kept = [item for item in items if level_of(item) in levels]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if level_of(item) not in levels])
        items[:] = kept


def _expect_failures(xfails: Sequence[Xfail], items: list[pytest.Item]) -> list[Xfail]:
    unused = set(xfails)
    for item in items:
        for xfail in xfails:
            if xfail.part in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=xfail.reason, strict=True))
                unused.discard(xfail)
    return [xfail for xfail in xfails if xfail in unused]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Lines of the list of known failures that met no test are most likely misspelt, or outdated."""
    for xfail in config.stash.get(_UNUSED, ()):
        terminalreporter.write_line(
            f"known failures: no test is called like {xfail.part!r} ({xfail.link})", yellow=True
        )


def level_of(item: pytest.Item) -> str | None:
    """The level that a test is marked with; None if it is none of ours."""
    mark = item.get_closest_marker(LEVEL)
    return str(mark.args[0]) if mark is not None else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Give each of our tests a seed that is known, so that its failure can be reproduced."""
    if level_of(item) is None:
        return (yield)
    with known_seed(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Say how to reproduce a failure."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    level = level_of(item)
    if report.failed and level is not None:
        from lmcache_conformance.runner.reproduce import command, test_id

        seed = seed_of(item)
        text = f"level {level} · {test_id(item).partition('::')[2]} · seed {seed}\n{command(item, seed)}"
        report.sections.append(("reproduce", text))
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def lmcache_budget(request: pytest.FixtureRequest) -> str:
    """`quick` or `full`: how thorough a test should be."""
    return str(request.config.option.lmcache_budget or "quick")


@pytest.fixture
def lmcache_seed(request: pytest.FixtureRequest) -> int:
    """For tests that draw numbers without Hypothesis: the seed that the failure's command repeats."""
    return seed_of(request.node) or 0


@pytest.fixture(scope="session")
def lmcache_adapter(request: pytest.FixtureRequest) -> str:
    """The name of the adapter under test, as `--lmcache-adapter` gives it."""
    reference = request.config.option.lmcache_adapter
    if not reference:
        from lmcache_conformance.runner.capability_skips import NO_ADAPTER

        pytest.skip(NO_ADAPTER)
    return str(reference)

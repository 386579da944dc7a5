"""What adapters share: version checks, log lines beside the engine's, and exceptions that the engine never sees."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmcache.adapter import (
    UnsupportedError,
    check_version,
    describe,
    guarded,
    join_log,
    reason_of,
    record_failure,
)
from lmcache.errors import ConfigError
from lmcache.observe.log import LOGGER, Throttle
from lmcache.observe.metrics import Metrics


def test_an_adapter_imports_neither_an_engine_nor_torch_for_it() -> None:
    code = "import sys, lmcache.adapter; print({'torch', 'numpy', 'vllm', 'sglang', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ("0.32", ""),
        ("0.32.5+cu129", ""),
        ("0.32.0rc1", ""),
        ("0.5.23+cpu", "too old"),
        ("0.27.9", "too old"),
        ("0.28rc1", "untested"),
        ("0.320.1", "untested"),
        ("1.0", "untested"),
        ("dev", "untested"),
    ],
)
def test_a_tested_series_covers_its_releases(version: str, outcome: str) -> None:
    assert outcome_of(version, tested=("0.30", "0.32"), oldest=(0, 28)) == outcome


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ("0.5.23", ""),
        ("0.5.23+cpu", ""),
        ("0.5.23.post1", "untested"),
        ("0.5.24rc1", "untested"),
        ("0.5.230", "untested"),
        ("0.5.22", "too old"),
        ("0.5.9.post2", "too old"),
    ],
)
def test_a_tested_release_covers_itself_alone(version: str, outcome: str) -> None:
    assert outcome_of(version, tested=("0.5.23",), oldest=(0, 5, 23)) == outcome


def outcome_of(version: str, *, tested: tuple[str, ...], oldest: tuple[int, ...]) -> str:
    try:
        warning = check_version("Engine", version, tested=tested, oldest=oldest)
    except UnsupportedError:
        return "too old"
    return "untested" if warning else ""


def test_version_messages_name_the_versions_and_the_engines_word_for_the_adapter() -> None:
    def check(version: str) -> str:
        return check_version("Engine", version, tested=("0.30", "0.32"), oldest=(0, 28), component="plugin")

    assert check("0.99+cpu").startswith("Engine 0.99+cpu was never tested with this plugin, only 0.30, 0.32;")
    with pytest.raises(UnsupportedError, match=r"Engine 0\.27\.1 is too old; the plugin needs 0\.28 or newer"):
        check("0.27.1")


# ---------------------------------------------------------------- logs


@contextmanager
def bare_loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """The root logger and an engine's; neither is configured, nor is the cache's. Not a fixture: pytest adds handlers later."""
    root, engine = logging.getLogger(), logging.getLogger("an engine")
    levels = {logger: logger.level for logger in (root, engine, LOGGER)}
    with pytest.MonkeyPatch.context() as patch:
        for logger in levels:
            patch.setattr(logger, "handlers", [])
            patch.setattr(logger, "propagate", True)
            logger.setLevel(logging.WARNING if logger is root else logging.NOTSET)
        try:
            yield root, engine
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def test_lines_go_to_the_engines_handlers_at_its_level() -> None:
    handler = logging.NullHandler()
    with bare_loggers() as (_, engine):
        engine.addHandler(handler)
        engine.setLevel(logging.DEBUG)
        engine.propagate = False
        for _ in range(2):
            join_log("an engine")
            assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([handler], logging.DEBUG, False)


def test_an_engine_that_configures_the_root_logger_sets_the_level_alone() -> None:
    with bare_loggers() as (root, _):
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.INFO)
        join_log()
        assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([], logging.INFO, True)


@pytest.mark.parametrize("configured", ["level", "handler", "root", "quiet engine"])
def test_what_the_application_has_configured_stays(configured: str) -> None:
    with bare_loggers() as (root, engine):
        engine.addHandler(logging.NullHandler())
        engine.setLevel(logging.ERROR if configured == "quiet engine" else logging.INFO)
        if configured == "level":
            LOGGER.setLevel(logging.ERROR)
        elif configured != "quiet engine":
            (LOGGER if configured == "handler" else root).addHandler(logging.NullHandler())
        before = list(LOGGER.handlers), LOGGER.level
        join_log("an engine")
        assert (LOGGER.handlers, LOGGER.level) == before


# ---------------------------------------------------------------- exceptions


def test_an_expected_error_is_its_message_and_any_other_has_its_type_before() -> None:
    assert reason_of(ConfigError("disk_path: no such folder")) == "disk_path: no such folder"
    assert reason_of(UnsupportedError("2 beams", reason="beams")) == "2 beams"
    assert reason_of(KeyError("k")) == "KeyError: 'k'"
    assert describe(ConfigError("disk_path")) == "ConfigError: disk_path"
    assert (UnsupportedError("a").reason, UnsupportedError("a", reason="beams").reason) == ("unsupported", "beams")


def test_a_guarded_call_gives_its_result_or_the_default() -> None:
    seen: list[Exception] = []
    assert guarded(lambda: 3, 0, seen.append) == 3
    assert seen == []
    error = OSError("disk")

    def fail() -> int:
        raise error

    assert guarded(fail, 0, seen.append) == 0
    assert seen == [error]
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt), None, seen.append)


def test_a_failure_is_counted_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics, log = Metrics(), Throttle()
    with caplog.at_level(logging.WARNING, "lmcache"):
        for op in ("load", "load", "store"):
            record_failure(ValueError("x y"), "storage-failed", log, metrics, key=op, op=op)
        record_failure(ValueError("x"), "cache-off", log)
    assert [record.getMessage() for record in caplog.records] == [
        'storage-failed op=load reason="ValueError: x y"',
        'storage-failed op=store reason="ValueError: x y"',
        'cache-off reason="ValueError: x"',
    ]
    [counted] = [value for name, value in metrics.snapshot().items() if "connector" in name and "internal" in name]
    assert counted == 3

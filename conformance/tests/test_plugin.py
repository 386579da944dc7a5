"""The pytest plugin: levels, capabilities, known failures, reproduction, and no effect on tests that use none of them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_conformance.runner.records import Began, Ended, Started, TestResult, read

pytest_plugins = ["pytester"]

SUITE = """
    from lmcache_conformance.contract import Capabilities, Level
    from lmcache_conformance.runner.marks import level, requires

    class SuiteTests:
        capabilities = Capabilities(dtypes=("float32",), tensor_parallel=(1, 2))
        @level(Level.BYTES)
        def test_bytes(self): pass
        @level(Level.RESTART)
        @requires("restart")
        def test_restart(self): raise AssertionError("it must not run")
        @level(Level.TOKENS)
        @requires("dtypes=float32", "tensor_parallel=2")
        def test_claimed(self): pass
        @level(Level.TOKENS)
        @requires("dtypes=bfloat16", "salt")
        def test_two_missing(self): raise AssertionError("it must not run")

    class TestIt(SuiteTests): pass
"""


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:cov", *options)


def results(path: Path) -> dict[str, TestResult]:
    return {e.nodeid.rpartition("::")[2]: e for e in read(path) if isinstance(e, TestResult)}


# ---------------------------------------------------------------- unrelated test suites


def test_an_ordinary_run_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import random, sys, pytest
        from hypothesis import core, given, strategies as st
        class TestTheirs:
            capabilities = None
            adapter = "theirs"
            def test_fails(self):
                assert core.global_force_seed is None
                assert 1 == 2
            @given(st.integers())
            def test_passes(self, x): assert core.global_force_seed is None
        def test_nothing_heavy_was_imported(): assert not {"lmcache", "lmcache_conformance.runner.recorder"} & set(sys.modules)
        """
    )
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers")
    done.assert_outcomes(passed=2, failed=1)
    assert "reproduce" not in done.stdout.str()
    assert "lmcache" not in done.stdout.str().partition("collected")[2].partition("warnings summary")[0]


def test_the_plugin_is_there_by_installation_and_its_marks_are_known(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    run(pytester, "--strict-markers").assert_outcomes(passed=2, skipped=2)
    assert "lmcache_level(name)" in run(pytester, "--markers").stdout.str()


# ---------------------------------------------------------------- capabilities


def test_what_is_not_claimed_is_skipped_with_that_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    run(pytester, "--lmcache-report=report").assert_outcomes(passed=2, skipped=2)
    found = results(pytester.path / "report")
    assert found["test_restart"].reason == "not claimed: restart"
    assert found["test_two_missing"].reason == "not claimed: dtypes=bfloat16, salt"
    assert found["test_restart"].outcome == "skipped"


def test_a_claim_makes_the_test_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE + "    class TestMore(SuiteTests): capabilities = Capabilities(restart=True)\n")
    run(pytester, "-k", "TestMore and test_restart").assert_outcomes(failed=1)


def test_a_misspelt_requirement_is_an_error_with_the_nearest_name(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE.replace('requires("restart")', 'requires("restrat")'))
    done = run(pytester)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*Capabilities has no capability 'restrat'; did you mean 'restart'?*")


def test_without_capabilities_nothing_is_claimed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE + "    class TestLess(SuiteTests): capabilities = None\n")
    run(pytester, "-k", "TestLess").assert_outcomes(passed=1, skipped=3)


ENGINE_SUITE = """
    from lmcache_conformance.contract import Level
    from lmcache_conformance.runner.marks import level, requires
    class TestEngine:
        adapter = None
        @level(Level.TOKENS)
        def test_any(self, lmcache_adapter): assert lmcache_adapter == "fake_adapters:good"
        @level(Level.RESTART)
        @requires("restart")
        def test_claimed(self): pass
        @level(Level.ISOLATION)
        @requires("salt")
        def test_unclaimed(self): assert False
"""


@pytest.fixture
def engine_suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(ENGINE_SUITE)
    pytester.syspathinsert(Path(__file__).parent)
    return pytester


def test_an_engine_suite_claims_what_the_named_adapter_does(engine_suite: pytest.Pytester) -> None:
    run(engine_suite, "--lmcache-adapter=fake_adapters:good", "-rs").assert_outcomes(passed=2, skipped=1)


def test_an_engine_that_is_not_installed_is_skipped_with_the_reason(engine_suite: pytest.Pytester) -> None:
    done = run(engine_suite, "--lmcache-adapter=fake_adapters:absent", "-rs")
    done.assert_outcomes(skipped=3)
    done.stdout.fnmatch_lines("*not installed here: fake-engine 1.0 is too old*")


def test_an_adapter_whose_engine_cannot_be_imported_is_skipped_too(engine_suite: pytest.Pytester) -> None:
    engine_suite.makepyfile(needs_an_engine="import a_missing_engine")
    done = run(engine_suite, "--lmcache-adapter=needs_an_engine:adapter", "-rs")
    done.assert_outcomes(skipped=3)
    done.stdout.fnmatch_lines("*not installed here: *No module named 'a_missing_engine'*")


def test_without_an_adapter_the_reason_says_how_to_name_one(engine_suite: pytest.Pytester) -> None:
    done = run(engine_suite, "-rs")
    done.assert_outcomes(skipped=3)
    done.stdout.fnmatch_lines("*no adapter was chosen: --lmcache-adapter NAME*")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hg", "*unknown adapter 'hg'; did you mean 'hf'?*"),
        ("fake_adapters:goood", "*'fake_adapters:goood' is not in its module*"),
        ("fake_adapters:not_an_adapter", "*not an EngineAdapter: it lacks name, capabilities, why_not, open*"),
        ("no_such_module:x", "*cannot be imported: No module named 'no_such_module'*"),
    ],
)
def test_a_wrong_adapter_name_is_an_error_that_helps(engine_suite: pytest.Pytester, name: str, message: str) -> None:
    done = run(engine_suite, f"--lmcache-adapter={name}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(message)


# ---------------------------------------------------------------- levels, budget


def test_only_tests_of_the_wanted_levels_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE + "    def test_unmarked(): assert False\n")
    run(pytester, "--lmcache-level=bytes").assert_outcomes(passed=1, deselected=4)
    run(pytester, "--lmcache-level=bytes,tokens").assert_outcomes(passed=2, skipped=1, deselected=2)
    done = run(pytester, "--lmcache-level=bites")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*unknown level 'bites'; did you mean 'bytes'?*")


def test_the_budget_is_quick_unless_asked_for_more(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "def test_it(lmcache_budget, lmcache_seed): assert lmcache_budget == 'quick' and lmcache_seed == 0"
    )
    run(pytester).assert_outcomes(passed=1)
    run(pytester, "--lmcache-budget=full").assert_outcomes(failed=1)


# ---------------------------------------------------------------- known failures

FAILING = """
    from lmcache_conformance.contract import Level
    from lmcache_conformance.runner.marks import level
    class TestIt:
        @level(Level.FAULTS)
        def test_fails(self): assert 1 == 2
        @level(Level.FAULTS)
        def test_passes(self): pass
"""


def test_a_known_failure_is_expected_with_its_link_as_the_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    pytester.makefile(".txt", xfails="# ours\n\nTestIt::test_fails   https://example.org/i/1  # until 2.0\n")
    run(pytester, "--lmcache-xfails=xfails.txt", "--lmcache-report=report").assert_outcomes(passed=1, xfailed=1)
    found = results(pytester.path / "report")["test_fails"]
    assert (found.outcome, found.reason) == ("xfailed", "until 2.0 (https://example.org/i/1)")


def test_a_known_failure_that_passes_is_a_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    pytester.makefile(".txt", xfails="TestIt:: https://example.org/i/1\n")
    run(pytester, "--lmcache-xfails=xfails.txt", "--lmcache-report=report").assert_outcomes(xfailed=1, failed=1)
    found = results(pytester.path / "report")["test_passes"]
    assert found.outcome == "failed"
    assert "XPASS(strict)" in found.message


def test_a_known_failure_that_is_no_test_is_mentioned(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    pytester.makefile(".txt", xfails="test_gone https://example.org/i/1\n")
    done = run(pytester, "--lmcache-xfails=xfails.txt")
    done.stdout.fnmatch_lines("known failures: no test matches 'test_gone' (https://example.org/i/1)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TestIt::test_fails\n", "*xfails.txt:1: 'TestIt::test_fails' names no issue; a line is*"),
        ("# ours\nTestIt # https://example.org/1\n", "*xfails.txt:2: *names no issue*"),
        ("https://example.org/1\n", "*names no issue*"),
        ("TestIt https://example.org/1 because\n", "*names no issue*"),
    ],
)
def test_a_known_failure_without_a_link_is_refused(pytester: pytest.Pytester, text: str, message: str) -> None:
    pytester.makepyfile(FAILING)
    pytester.makefile(".txt", xfails=text)
    done = run(pytester, "--lmcache-xfails=xfails.txt")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(message)


def test_a_missing_list_of_known_failures_is_an_error(pytester: pytest.Pytester) -> None:
    done = run(pytester, "--lmcache-xfails=none.txt")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*'none.txt' cannot be read*")


# ---------------------------------------------------------------- reproduction and report

RANDOM = """
    from hypothesis import given, settings, strategies as st
    from lmcache_conformance.contract import Level
    from lmcache_conformance.runner.marks import level
    import pytest, random
    class CheckIt:
        @level(Level.KEYS)
        @pytest.mark.parametrize("case", ["a b", "$c"])
        @settings(database=None, max_examples=5, deadline=None)
        @given(st.lists(st.integers(0, 2**60), min_size=3))
        def test_drawn(self, case, x):
            with open("drawn", "a") as file: print(x, file=file)
            assert case == "a b"
        @level(Level.KEYS)
        def test_random(self, lmcache_seed):
            with open("random", "a") as file: print(random.Random(lmcache_seed).random(), file=file)
            assert False
"""


@pytest.mark.parametrize("seed", [(), ("--hypothesis-seed=77",)])
def test_the_command_in_the_failure_repeats_the_very_same_failure(
    pytester: pytest.Pytester, seed: tuple[str, ...]
) -> None:
    pytester.mkdir("below").joinpath("check_this.py").write_text("\n".join(s[4:] for s in RANDOM.splitlines()))
    options = ("-o", "python_classes=Check*", "-o", "python_files=check_*.py", *seed)
    first = pytester.runpytest_subprocess(*options, "-p", "no:cacheprovider", "--lmcache-report=report")
    first.assert_outcomes(passed=1, failed=2)
    for name, file in (("test_drawn[$c]", "drawn"), ("test_random", "random")):
        failed = results(pytester.path / "report")[name]
        assert failed.seed is not None
        assert not seed or failed.seed == 77
        assert failed.level == "keys"
        shown = first.stdout.str()
        assert f"level keys · CheckIt::{name} · seed {failed.seed}\n{failed.command}" in shown
        before = (pytester.path / file).read_text().split("\n")
        (pytester.path / file).unlink()
        words = shlex.split(failed.command)
        assert words[:3] == [sys.executable, "-m", "pytest"]
        assert words[3] == f"below/check_this.py::CheckIt::{name}"
        again = subprocess.run(
            failed.command, shell=True, cwd=pytester.path, capture_output=True, text=True, check=False
        )
        assert "1 failed" in again.stdout
        after = (pytester.path / file).read_text().split("\n")
        assert [line for line in after if line]
        assert set(after) <= set(before)


def test_a_command_for_a_file_elsewhere_names_it_in_full(
    pytester: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("else where")
    (folder / "test_far.py").write_text("\n".join(s[4:] for s in FAILING.splitlines()))
    run(pytester, str(folder), "--lmcache-report=report", "--lmcache-budget=full")
    failed = results(pytester.path / "report")["test_fails"]
    words = shlex.split(failed.command)
    assert words[3] == f"{folder}/test_far.py::TestIt::test_fails"
    assert "--lmcache-budget=full" in words
    again = subprocess.run(failed.command, shell=True, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert "1 failed" in again.stdout


OUTCOMES = """
    import pytest
    from lmcache_conformance.contract import Level
    from lmcache_conformance.runner.failures import EngineDied
    from lmcache_conformance.runner.marks import level
    pytestmark = level(Level.PRESSURE)
    @pytest.fixture
    def broken(): raise AssertionError("in the fixture")
    @pytest.fixture
    def breaks():
        yield
        raise OSError("afterwards")
    def test_assertion():
        print("printed")
        assert "what was stored" == "what was read"
    def test_failed(): pytest.fail("hung")
    def test_group(): raise ExceptionGroup("two", [AssertionError("x"), ValueError("y")])
    def test_engine(): raise EngineDied("a", "generate", "its process ended", "")
    def test_error(): raise ValueError("not a check")
    def test_surrogate(): raise ValueError("name \\udcff")
    def test_setup(broken): pass
    def test_teardown(breaks): pass
    def test_both(breaks): assert False, "first"
    def test_skip(): pytest.skip("needs a GPU")
    def test_pass(): pass
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup came with Python 3.11")
def test_the_report_tells_checks_from_accidents(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(OUTCOMES)
    run(pytester, "--lmcache-report=report")
    found = results(pytester.path / "report")
    by_assertion = {name for name, r in found.items() if r.by_assertion}
    assert by_assertion == {"test_assertion", "test_failed", "test_group", "test_engine", "test_both"}
    failed = {name for name, r in found.items() if r.outcome == "failed"}
    assert failed == by_assertion | {"test_error", "test_surrogate", "test_setup", "test_teardown"}
    assert all(r.level == "pressure" for r in found.values())
    assert "what was read" in found["test_assertion"].message
    assert "printed" in found["test_assertion"].detail
    assert found["test_setup"].message.startswith("in setup: ")
    assert found["test_teardown"].message == "in teardown: OSError: afterwards"
    assert "first" in found["test_both"].message
    assert found["test_skip"].reason == "needs a GPU"
    assert found["test_pass"].outcome == "passed"
    events = read(pytester.path / "report")
    assert events[0] == Began(len(found))
    assert events[-1] == Ended(1)
    assert [type(e) for e in events[1:-1]] == [Started, TestResult] * len(found)


def test_a_module_that_cannot_be_imported_is_a_failure_in_the_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import no_such_thing")
    run(pytester, "--lmcache-report=report")
    [result] = [e for e in read(pytester.path / "report") if isinstance(e, TestResult)]
    assert result.outcome == "failed"
    assert result.message == "not collected: ModuleNotFoundError: No module named 'no_such_thing'"
    assert not result.by_assertion


def test_resuming_leaves_out_what_was_begun(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    run(pytester, "-k", "fails", "--lmcache-report=report")
    run(pytester, "--lmcache-report=report", "--lmcache-resume").assert_outcomes(passed=1, deselected=1)
    assert set(results(pytester.path / "report")) == {"test_fails", "test_passes"}
    with (pytester.path / "report").open("ab") as file:
        file.write(b'{"event":"result","nodeid":"cut sh')
    assert set(results(pytester.path / "report")) == {"test_fails", "test_passes"}


def test_asserts_of_suites_explain_themselves_in_other_peoples_modules(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from lmcache_conformance.suites.tiers import TierTests
        from lmcache.tiers.memory import MemoryTier
        class Nameless(MemoryTier):
            name = ""
        class TestTheirTier(TierTests):
            def open_tier(self, place, capacity): return Nameless(capacity)
        """
    )
    done = pytester.runpytest_subprocess("-k", "protocol", "-p", "no:cacheprovider")
    done.assert_outcomes(failed=1, deselected=done.parseoutcomes()["deselected"])
    done.stdout.fnmatch_lines("E       AssertionError: assert ''", consecutive=False)

"""Settings: parsing, precedence, sources, and error messages with advice."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.config import Config
from lmcache.config.machine import is_container, is_wsl, memory_limit
from lmcache.config.settings import UNITS, format_size, parse_size
from lmcache.control.eviction import POLICIES
from lmcache.errors import ConfigError


def test_defaults_are_valid_and_come_from_the_declarations() -> None:
    config = Config()
    assert config.chunk_tokens == 256
    assert config.disk_path is None
    assert config.disk_bytes == 100 * 2**30
    assert 0 < config.dram_bytes <= 4 * 2**30
    assert {s.name for s in Config.settings()} == {f.name for f in dataclasses.fields(Config)}
    assert all(config.source(s.name) == "default" for s in Config.settings())


def test_sizes_go_in_as_text_and_come_out_as_bytes() -> None:
    config = Config(dram_bytes="64MiB", disk_path="/tmp/x", disk_bytes="2GB", queue_bytes=1 << 21)
    assert (config.dram_bytes, config.disk_bytes, config.queue_bytes) == (64 * 2**20, 2 * 10**9, 1 << 21)
    assert config.disk_path == Path("/tmp/x")
    assert Config(dram_bytes=0).dram_bytes == 0


def test_a_config_is_a_value() -> None:
    config = Config(chunk_tokens=16)
    assert config == Config(chunk_tokens=16) != Config(chunk_tokens=32)
    assert hash(config) == hash(Config(chunk_tokens=16))
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.source("chunk_tokens") == "explicit"
    assert dataclasses.replace(config, io_threads=7).chunk_tokens == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_tokens = 32  # type: ignore[misc]
    assert config.chunk_tokens == 16


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("1B", 1),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1.5GiB", 3 << 29),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes_parse_strictly(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "bad", ["", "x", "4G", "4gb", "1kB", "-1", "1e9", "0.3B", "1,5GiB", "NaN", "4 GiB B", 1.5, True, None, -1, b"4"]
)
def test_what_is_not_clearly_a_size_is_refused(bad: object) -> None:
    with pytest.raises(ConfigError):
        parse_size(bad)


def test_an_ambiguous_unit_gets_both_readings_as_advice() -> None:
    with pytest.raises(ConfigError, match=r"4GB or 4GiB"):
        parse_size("4G")


@given(st.integers(0, 1 << 62))
@settings(max_examples=200, deadline=None)
def test_a_formatted_size_parses_back_exactly(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(1, 999), st.sampled_from(sorted(UNITS)))
@settings(max_examples=300, deadline=None)
def test_a_formatted_size_is_never_longer_than_what_was_written(number: int, unit: str) -> None:
    assert len(format_size(parse_size(f"{number}{unit}"))) <= len(f"{number}{unit}")


@pytest.mark.parametrize(
    ("given_values", "says"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens: 0 is out of range; give a whole number from 1"),
        ({"chunk_tokens": "256"}, "chunk_tokens: '256' is not a whole number"),
        ({"chunk_tokens": True}, "chunk_tokens: True is not a whole number"),
        ({"dram_bytes": -1}, "dram_bytes: -1 is negative"),
        ({"dram_bytes": "1PiB"}, "dram_bytes: 1PiB is beyond the .* GiB of memory this process may use; give"),
        ({"disk_path": "/tmp", "disk_bytes": 5}, "disk_bytes: 5 is too small; give at least 1MiB"),
        ({"disk_bytes": "1GiB"}, "disk_bytes: given without disk_path; set disk_path"),
        ({"disk_path": __file__}, "disk_path: .* is a file; give a folder"),
        ({"disk_path": ""}, "disk_path: '' is not a path"),
        ({"disk_path": 5}, "disk_path: 5 is not a path"),
        ({"disk_path": "~no-such-user-here/x"}, "disk_path: .*give an absolute path"),
        ({"disk_order": "Native"}, "disk_order: 'Native' is not one of 'canonical', 'native'"),
        ({"policy": "fifo"}, "policy: 'fifo' is not one of 'lru'"),
        ({"share": None}, "share: None is not one of"),
        ({"io_threads": 0}, "io_threads: 0 is out of range"),
        ({"lease_s": 0}, "lease_s: 0 is not a number of seconds above 0"),
        ({"load_timeout_s": float("nan")}, "load_timeout_s: nan is not"),
        ({"load_timeout_s": float("inf")}, "load_timeout_s: inf is not"),
        ({"strict": "yes"}, "strict: 'yes' is neither true nor false"),
        ({"chunk_token": 1}, "unknown setting 'chunk_token'; did you mean 'chunk_tokens'"),
        ({"zzz": 1}, "unknown setting 'zzz'; known: chunk_tokens, dram_bytes"),
    ],
)
def test_an_impossible_value_is_refused_with_its_name_and_advice(given_values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(**given_values)


def test_the_nearest_source_wins_and_every_source_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_tokens: 16\nio_threads: 3\npolicy: lru\nlease_s: 5\n")
    environ = {
        "LMCACHE_CONFIG_FILE": str(file),
        "LMCACHE_CHUNK_TOKENS": "32",
        "LMCACHE_IO_THREADS": "4",
        "LMCACHE_STRICT": "true",
        "PATH": "/bin",
    }
    config = Config.load({"chunk_tokens": 128}, json='{"chunk_tokens": 64, "policy": "lfu"}', environ=environ)
    assert (config.chunk_tokens, config.io_threads, config.policy, config.lease_s, config.strict) == (
        128,
        4,
        "lfu",
        5.0,
        True,
    )
    assert config.source("chunk_tokens") == "explicit"
    assert config.source("policy") == "engine JSON"
    assert config.source("io_threads") == "env LMCACHE_IO_THREADS"
    assert config.source("lease_s") == f"file {file}"
    assert config.source("share") == "default"
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        config.source("shar")


def test_describe_is_plain_data_with_value_and_source(tmp_path: Path) -> None:
    described = Config.load({"disk_path": tmp_path}, environ={}).describe()
    assert described["disk_path"] == {"value": str(tmp_path), "source": "explicit"}
    assert list(described) == [s.name for s in Config.settings()]


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("LMCACHE_CHUNK_TOKENS", " 64 ", "chunk_tokens", 64),
        ("LMCACHE_DRAM_BYTES", "1048576", "dram_bytes", 1 << 20),
        ("LMCACHE_LEASE_S", "2.5", "lease_s", 2.5),
        ("LMCACHE_STRICT", "0", "strict", False),
        ("LMCACHE_STRICT", "Yes", "strict", True),
        ("LMCACHE_DISK_PATH", "/tmp/cache", "disk_path", Path("/tmp/cache")),
        ("LMCACHE_DISK_PATH", "", "disk_path", None),
    ],
)
def test_environment_variables_are_read_as_text(variable: str, text: str, name: str, value: object) -> None:
    assert getattr(Config.load(environ={variable: text}), name) == value


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (
            {"LMCACHE_CHUNK_TOKEN": "1"},
            "unknown environment variable 'LMCACHE_CHUNK_TOKEN'; did you mean 'LMCACHE_CHUNK_TOKENS'",
        ),
        (
            {"LMCACHE_CHUNK_TOKENS": "many"},
            r"chunk_tokens \(from env LMCACHE_CHUNK_TOKENS\): 'many' is not a whole number",
        ),
        ({"LMCACHE_DRAM_BYTES": "1PiB"}, r"dram_bytes \(from env LMCACHE_DRAM_BYTES\): 1PiB is beyond"),
        ({"LMCACHE_DISK_BYTES": "1GiB"}, r"disk_bytes \(from env LMCACHE_DISK_BYTES\): given without disk_path"),
        ({"LMCACHE_LEASE_S": "soon"}, "lease_s .*'soon' is not a number of seconds"),
        ({"LMCACHE_STRICT": "maybe"}, "strict .*'maybe' is neither true nor false"),
        ({"LMCACHE_CONFIG_FILE": "/no/such/file"}, "'/no/such/file' cannot be read .*check LMCACHE_CONFIG_FILE"),
    ],
)
def test_a_wrong_environment_is_an_error_that_names_the_variable(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config.load(environ=environ)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"chunk_tokenz: 3", "unknown setting in file .*: 'chunk_tokenz'; did you mean 'chunk_tokens'"),
        (b"chunk_tokens: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a\n- b", "must hold `name: value` lines, not list"),
        (b"chunk_tokens: '5'", r"chunk_tokens \(from file .*\): '5' is not a whole number"),
    ],
)
def test_a_wrong_settings_file_is_an_error_that_names_it(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        Config.load(file=file, environ={})


def test_an_empty_settings_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert Config.load(file=tmp_path / "empty.yaml", environ={}) == Config()


@pytest.mark.parametrize(
    ("json", "says"),
    [
        ("{", "cannot be parsed"),
        ("[1]", "must be an object"),
        ('{"polizy": "lru"}', "setting in engine JSON: 'polizy'; did you mean 'policy'"),
    ],
)
def test_wrong_engine_json_is_an_error(json: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config.load(json=json, environ={})


def test_a_typo_is_found_even_where_another_source_overrules_it() -> None:
    with pytest.raises(ConfigError, match="LMCACHE_POLICI"):
        Config.load({"policy": "lfu"}, environ={"LMCACHE_POLICI": "lru"})


def test_importing_settings_imports_no_torch() -> None:
    code = "import sys, lmcache.config; lmcache.config.Config(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


def _machine(root: Path, total_kib: int, cgroup: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       {total_kib} kB\nMemFree: 1 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "mib"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{256 << 20}\n"}, 256),
        ("0::/a/b\n", {"a/b/memory.max": f"{128 << 20}\n", "a/memory.max": f"{256 << 20}\n"}, 128),
        ("0::/host/path\n", {"memory.max": f"{64 << 20}\n"}, 64),
        ("5:cpu,memory:/a\n4:pids:/x\n", {"memory/a/memory.limit_in_bytes": f"{512 << 20}\n"}, 512),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, 1024),
        ("", {}, 1024),
    ],
)
def test_the_memory_limit_is_the_least_of_the_machines_and_all_cgroups(
    tmp_path: Path, cgroup: str, limits: dict[str, str], mib: int
) -> None:
    assert memory_limit(_machine(tmp_path, 1 << 20, cgroup, limits)) == mib << 20


def test_automatic_dram_is_half_of_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.config.config.memory_limit", lambda: 1 << 30)
    assert Config().dram_bytes == 1 << 29
    with pytest.raises(ConfigError, match=r"beyond the 1\.0 GiB"):
        Config(dram_bytes=(1 << 30) + 1)
    monkeypatch.setattr("lmcache.config.config.memory_limit", lambda: None)
    assert Config().dram_bytes == 4 << 30
    assert Config(dram_bytes="1PiB").dram_bytes == 1 << 50


def test_wsl_and_containers_are_recognised(tmp_path: Path) -> None:
    assert not is_container(tmp_path)
    (tmp_path / ".dockerenv").touch()
    assert is_container(tmp_path)
    release = tmp_path / "proc/sys/kernel/osrelease"
    release.parent.mkdir(parents=True)
    release.write_text("6.6.1-generic\n")
    assert not is_wsl(tmp_path)
    release.write_text("5.15.153.1-microsoft-standard-WSL2\n")
    assert is_wsl(tmp_path)


def test_the_policies_offered_are_those_there_are() -> None:
    for policy in POLICIES:
        assert Config(policy=policy).policy == policy  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=", ".join(map(repr, POLICIES))):
        Config(policy="none")  # type: ignore[arg-type]


def test_the_former_default_policy_is_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.load({}, json='{"policy": "density"}', environ={})
    assert config.policy == Config().policy == "adaptive"
    assert caplog.messages == ["setting-replaced given=density used=adaptive"]

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
from lmcache.observe.log import Throttle


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
        ('{"lmcache.chunk_size": 256}', "'lmcache.chunk_size'; did you mean 'chunk_tokens'"),
        ('{"LMCACHE_DISK_PATH": "/x"}', "'LMCACHE_DISK_PATH'; did you mean 'disk_path'"),
        ("{", "cannot be parsed"),
        ("[1]", "must be an object"),
        ('{"io_threads": 1, "io_threads": 2}', "'io_threads' is given twice"),
        ('{"polizy": "lru"}', "setting in engine JSON: 'polizy'; did you mean 'policy'"),
    ],
)
def test_wrong_engine_json_is_an_error(json: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config.load(json=json, environ={})


SERVICE = {  # what the kubelet sets for the Services `lmcache` and `lmcache-disk-path`
    "LMCACHE_SERVICE_HOST": "10.96.0.12",
    "LMCACHE_SERVICE_PORT": "80",
    "LMCACHE_SERVICE_PORT_HTTP": "80",
    "LMCACHE_PORT": "tcp://10.96.0.12:80",
    "LMCACHE_PORT_80_TCP": "tcp://10.96.0.12:80",
    "LMCACHE_PORT_80_TCP_PROTO": "tcp",
    "LMCACHE_PORT_80_TCP_PORT": "80",
    "LMCACHE_PORT_80_TCP_ADDR": "10.96.0.12",
    "LMCACHE_DISK_PATH_SERVICE_HOST": "10.96.0.13",
    "LMCACHE_DISK_PATH_PORT": "udp://10.96.0.13:53",
}


def test_the_variables_of_a_kubernetes_service_are_no_settings(caplog: pytest.LogCaptureFixture) -> None:
    config = Config.load(environ={**SERVICE, "LMCACHE_CHUNK_TOKENS": "64"})
    assert config == Config(chunk_tokens=64)
    assert caplog.messages == []


def test_variables_of_the_other_project_are_ignored_with_one_line_that_says_what_to_set(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache.config.environment._LOG", Throttle(every=float("inf")))
    environ = {
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "5.0",
        "LMCACHE_REMOTE_URL": "redis://x:6379",
        "LMCACHE_MP_PORT": "5555",
        "LMCACHE_IO_THREADS": "3",
    }
    for _ in range(3):
        assert Config.load(environ=environ) == Config(io_threads=3)
    (line,) = caplog.messages
    assert line.startswith("foreign-variables-ignored ")
    for variable in environ:
        assert (variable in line) == (variable != "LMCACHE_IO_THREADS")
    assert "set LMCACHE_CHUNK_TOKENS instead of LMCACHE_CHUNK_SIZE" in line
    assert "set LMCACHE_DRAM_BYTES instead of LMCACHE_LOCAL_CPU" in line


@pytest.mark.parametrize("name", [s.name for s in Config.settings()])
def test_ours_misspelt_by_one_letter_is_an_error(name: str) -> None:
    for wrong in (name[:-1], name + "x", name[0] + name[2:], name[1] + name[0] + name[2:]):
        with pytest.raises(ConfigError, match=f"did you mean 'LMCACHE_{name.upper()}'"):
            Config.load(environ={f"LMCACHE_{wrong.upper()}": "1"})


def test_a_file_of_the_other_project_gets_our_names_as_advice(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("local_cpu: true\n")
    with pytest.raises(ConfigError, match=r"unknown setting in file .*: 'local_cpu'; did you mean 'dram_bytes'"):
        Config.load(file=tmp_path / "theirs.yaml", environ={})


@pytest.mark.parametrize("setting", ["disk_path", "record_trace"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file:///mnt/x", "is a URL, not a path; write '/mnt/x'"),
        ("FILE://localhost/mnt/x", "is a URL, not a path; write '/mnt/x'"),
        ("file://~/kv", "is a URL, not a path; give an absolute path"),
        ("file:kv", "is a URL"),
        ("s3://bucket/kv", "is a URL, not a path; give an absolute path"),
        ("C:\\kv", "is a path of Windows"),
        ('"/mnt/x"', "has quotes in it, which nothing has removed; write '/mnt/x'"),
        ("'/mnt/x'", "write '/mnt/x'"),
        ("$HOME/kv", "nothing has replaced '[$]HOME' in it"),
        ("/mnt/${DIR}/kv", "nothing has replaced '[$]{DIR}' in it"),
        ("$(pwd)/kv", "nothing has replaced '[$][(]pwd[)]' in it"),
        ("{{ .Values.path }}/kv", "nothing has replaced '{{ .Values.path }}' in it"),
        ("", "'' is not a path"),
        ("  ", "is not a path"),
        (Path(), "is not a path"),
        (" /mnt/x", "has white space around it; write '/mnt/x'"),
        ("/mnt/x\n/kv", "has a control character"),
        ("/mnt/\0", "has a control character"),
        ("none", "leave it unset for none, or write './none'"),
        ("/" + "x" * 300, "cannot be a path .File name too long"),
    ],
)
def test_a_path_that_would_be_an_odd_name_here_is_refused(setting: str, text: str | Path, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: .*{says}"):
        Config(**{setting: text})


@pytest.mark.parametrize(
    "text", ["kv", "./none", "kv[prod]", "/mnt/a b/kv", "/mnt/share$/kv", "~/kv", "/mnt/a:b/kv", "kv'2"]
)
def test_plain_paths_are_accepted(text: str) -> None:
    assert Config(disk_path=text).disk_path == Path(text).expanduser().absolute()


def test_a_path_that_cannot_be_looked_at_is_left_to_its_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    assert Config(disk_path="/locked/kv", record_trace="/locked/t").disk_path == Path("/locked/kv")


def test_a_limit_beside_an_empty_path_is_refused_unless_a_nearer_source_turned_the_disk_off(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    for empty in ("~", "", "null"):
        file.write_text(f"disk_path: {empty}\ndisk_bytes: 1GiB\n")
        with pytest.raises(
            ConfigError, match=r"disk_bytes \(from file .*\): given beside an empty disk_path; set disk_path"
        ):
            Config.load(file=file, environ={})
    file.write_text("disk_path: ~\n")
    with pytest.raises(ConfigError, match="beside an empty disk_path"):
        Config.load(file=file, environ={"LMCACHE_DISK_BYTES": "1GiB"})
    with pytest.raises(ConfigError, match="beside an empty disk_path"):
        Config(disk_path=None, disk_bytes="1GiB")
    both = {"LMCACHE_DISK_BYTES": "1GiB", "LMCACHE_DISK_PATH": "/mnt/x"}
    assert Config.load({"disk_path": None}, environ=both) == Config()
    assert dataclasses.replace(Config(), io_threads=3).disk_path is None
    assert dataclasses.replace(Config(disk_path="/mnt/x", disk_bytes="1GiB"), disk_path=None).disk_path is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("io_threads: 3\nstrict: true\nio_threads: 4\n", "'io_threads' is given on line 1 and on line 3; drop one"),
        ("io_threads: 010\n", "line 1: 010 is octal in YAML, that is 8; write 10 or 8"),
        ("dram_bytes: 0_100\n", "octal"),
        ("lease_s: 1:30\n", "line 1: 1:30 is a number to the base 60"),
        ("lease_s: 2026-99-99\n", "is not YAML"),
    ],
)
def test_what_yaml_reads_otherwise_than_people_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"settings file .*{says}"):
        Config.load(file=file, environ={})
    file.write_text("io_threads: 0x10\nchunk_tokens: 1_000\nlease_s: 0.5\nrecord_trace: /tmp/010\n")
    config = Config.load(file=file, environ={})
    assert (config.io_threads, config.chunk_tokens, config.lease_s) == (16, 1000, 0.5)


def test_a_settings_file_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty; give its path"):
        Config.load(file="", environ={})
    for name in ("~no-such-user-here/x", "a\0b", str(tmp_path)):
        with pytest.raises(ConfigError, match="settings file"):
            Config.load(file=name, environ={})


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

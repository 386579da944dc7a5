"""All settings of a cache, each declared once, and the sources they are loaded from.

    Config(dram_bytes="8GiB")              # in code; all other settings have their defaults
    Config.load({"dram_bytes": "8GiB"})    # explicit > engine's JSON > LMCACHE_* > file named by LMCACHE_CONFIG_FILE > default

Importing this module imports neither torch nor an engine.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmcache.config.environment import OTHERS, PREFIX, is_foreign, is_service, warn_foreign
from lmcache.config.files import read_json, read_yaml
from lmcache.config.machine import memory_limit
from lmcache.config.settings import (
    Choice,
    File,
    Flag,
    Folder,
    Rate,
    Seconds,
    Setting,
    Size,
    Text,
    Whole,
    format_size,
    parse_size,
)
from lmcache.errors import ConfigError

Order = Literal["canonical", "native"]
Policy = Literal["lru", "lfu", "s3fifo", "adaptive"]
Admission = Literal["all", "second", "adaptive"]
Share = Literal["exact", "semantic"]
Fingerprint = Literal["fast", "full"]
Pinning = Literal["auto", "always", "never"]
Checksums = Literal["off", "write", "load"]

FILE_VARIABLE = "LMCACHE_CONFIG_FILE"


def _auto_dram() -> int:
    limit = memory_limit()
    wanted = parse_size("4GiB")
    return wanted if limit is None else min(wanted, limit // 2)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one `CacheEngine`. Immutable; values are checked on construction.

    Raises:
        ConfigError: a value is invalid; the message has the setting, the value, and what to use instead.
    """

    chunk_tokens: Setting[int, int] = Setting(
        Whole(low=1, high=1 << 20),
        256,
        unit="tokens",
        doc="Tokens per chunk, the unit in which KV is hashed, stored and looked up. Rounded up to a multiple of the engine's "
        "block size. Part of every object's key: objects written with another value are not found.",
    )
    dram_bytes: Setting[int | str, int] = Setting(
        Size(auto=_auto_dram),
        "auto",
        unit="bytes",
        doc="Host memory for cached KV. `auto`: 4GiB, or half of the memory available to this process if that is less. 0: "
        "nothing is kept in memory; only a small bounce buffer for the tiers below is allocated.",
    )
    disk_path: Setting[str | Path | None, Path | None] = Setting(
        Folder(),
        None,
        doc="Folder of the disk tier, created if missing; several processes may share it. Unset: no disk tier.",
    )
    disk_bytes: Setting[int | str, int] = Setting(
        Size(low=1 << 20),
        "100GiB",
        unit="bytes",
        doc="Size limit of the disk tier's folder, enforced by eviction, for all processes that share it together.",
    )
    disk_order: Setting[Order, Order] = Setting(
        Choice(("canonical", "native")),
        "canonical",
        doc="Byte order of objects on disk. `canonical` can be read by every engine, block size and processor without knowledge "
        "of the writer; `native` keeps the writer's page layout (faster), and readers with another layout translate.",
    )
    policy: Setting[Policy | Literal["density"], Policy] = Setting(
        Choice(("lru", "lfu", "s3fifo", "adaptive"), former={"density": "adaptive"}),
        "adaptive",
        doc="Which objects leave memory first when room is needed. `adaptive` is `lru`, but gives up earlier what was used "
        "seldom, as long as that is measured to find more; the others are as in the literature. `density`, of earlier "
        "versions, is accepted and means `adaptive`.",
    )
    admission: Setting[Admission, Admission] = Setting(
        Choice(("all", "second", "adaptive")),
        "adaptive",
        doc="What is written to a full disk tier, where each write evicts other objects: `all`: every object, as it is stored; "
        "`second`: only objects that were stored before and have to be stored again; `adaptive`: whichever of the two is "
        "measured to give more hits or, at equal hits, the one that writes less. An object that is not written is lost when it "
        "is evicted from memory.",
    )
    prefill_tokens_per_s: Setting[float | None, float | None] = Setting(
        Rate(),
        None,
        unit="tokens per second",
        doc="Prefill speed of the engine, as measured by you. If set, nothing is written to a tier from which loading would be "
        "slower than recomputing, by the tier's own measured speed. Unset: the comparison is not made.",
    )
    share: Setting[Share, Share] = Setting(
        Choice(("exact", "semantic")),
        "exact",
        doc="`exact`: KV is reused only if it was computed with the same numerics (engine, version, attention backend, "
        "instruction set, dtype, parallelism), so a hit equals recomputation. `semantic`: KV is reused across numerics: same "
        "model and tokens, different rounding.",
    )
    fingerprint: Setting[Fingerprint, Fingerprint] = Setting(
        Choice(("fast", "full")),
        "full",
        doc="How local weights are identified: `full` hashes every byte, once (digests are cached by inode, size, mtime and "
        "ctime). `fast`, which once sampled the files, means the same.",
    )
    model_identity: Setting[str | None, str | None] = Setting(
        Text(),
        None,
        doc="Name of the weights, used instead of inspecting them: engines with the same name are assumed to hold the same "
        "weights. The model's configuration is part of every name nevertheless. Unset: the weights are inspected.",
    )
    memory_checksums: Setting[Checksums, Checksums] = Setting(
        Choice(("off", "write", "load")),
        "write",
        doc="Checksums of KV in host memory, against stray writes and memory errors. `write`: made when KV is gathered, and "
        "verified when it is written to a tier; what has changed is not written, and leaves memory. `load`: verified before each "
        "load as well. `off`: none are made; what has changed in memory is written, and served, as it is. What each costs on "
        "this machine: `lmcache bench io`.",
    )
    pin_memory: Setting[Pinning, Pinning] = Setting(
        Choice(("auto", "always", "never")),
        "auto",
        doc="Whether to page-lock host memory for faster device copies. `auto`: where possible; `always`: fail at start-up "
        "otherwise.",
    )
    copy_engine_bytes: Setting[int | str, int] = Setting(
        Size(low=1),
        "28KiB",
        unit="bytes",
        doc="On a GPU, pieces of at least this many bytes that are contiguous on both sides are copied by the copy engine, which "
        "uses no compute; smaller pieces by a kernel. The default is the size from which an H100's copy engine was measured to "
        "be fast.",
    )
    staging_bytes: Setting[int | str, int] = Setting(
        Size(low=1 << 20),
        "256MiB",
        unit="bytes",
        doc="Device memory that stages stores and loads on a GPU, half of it for each. Stores of one step that exceed their half "
        "wait for the host link in the engine's stream; if the link is a GiB behind, stores are skipped and counted.",
    )
    io_threads: Setting[int, int] = Setting(
        Whole(low=1, high=256),
        2,
        unit="threads",
        doc="Threads that read, write and verify objects of the tiers below memory.",
    )
    queue_bytes: Setting[int | str, int] = Setting(
        Size(low=1 << 20),
        "512MiB",
        unit="bytes",
        doc="Most bytes that may be queued for write-back to the tiers below memory. Beyond it, write-backs are skipped and "
        "counted; the engine never waits.",
    )
    load_timeout_s: Setting[float, float] = Setting(
        Seconds(), 10.0, unit="seconds", doc="Time limit of a load from a tier below memory; a slower one is a miss."
    )
    probe_timeout_s: Setting[float, float] = Setting(
        Seconds(),
        0.2,
        unit="seconds",
        doc="Time limit of the check whether a shared tier holds an object; a slower one is a miss.",
    )
    lease_s: Setting[float, float] = Setting(
        Seconds(),
        60.0,
        unit="seconds",
        doc="How long the objects found by a lookup are protected from eviction if they are neither retrieved nor released.",
    )
    record_trace: Setting[str | Path | None, str | None] = Setting(
        File(),
        None,
        doc="File to which every lookup appends one line for `lmcache simulate`: time, number of prompt tokens, and hashed keys "
        "of the chunks; no text and no token ids. Readable by its owner only. Unset: nothing is recorded.",
    )
    strict: Setting[bool, bool] = Setting(
        Flag(),
        False,
        doc="Raise an error where part of the cache cannot work (a folder that cannot be opened, a model or call that cannot be "
        "cached). Otherwise the cache continues without it, with a counter and one log line.",
    )

    def __new__(cls, **given: Any) -> Config:
        """Rejects unknown names with a better message than Python's, and records which settings were given."""
        _refuse_unknown(given, "setting")
        # `dataclasses.replace` gives all settings, so that None is then what the config had, or what was asked for.
        replaced = len(given) == len(cls.settings())
        if "disk_bytes" in given and given.get("disk_path") is None and not replaced:
            how = "beside an empty disk_path" if "disk_path" in given else "without disk_path"
            raise ConfigError(f"disk_bytes: given {how}; set disk_path to a folder, or drop disk_bytes")
        config = super().__new__(cls)
        config.__dict__["_sources"] = dict.fromkeys(given, "explicit")
        return config

    def __post_init__(self) -> None:
        limit = memory_limit()
        if limit is not None and self.dram_bytes > limit:
            raise ConfigError(
                f"dram_bytes: {format_size(self.dram_bytes)} is beyond the {limit / 2**30:.1f} GiB of memory this process "
                f"may use; give at most that, or better half of it (dram_bytes='{max(1, limit // 2**30 // 2)}GiB'), or 'auto'"
            )

    @property
    def selective(self) -> bool:
        """Whether admission may refuse to write an object to a tier, so that the tiers' room and speed have to be measured."""
        return self.admission != "all" or self.prefill_tokens_per_s is not None

    @classmethod
    def settings(cls) -> tuple[Setting[Any, Any], ...]:
        """Returns the declarations in order."""
        return tuple(setting for setting in vars(cls).values() if isinstance(setting, Setting))

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, Any] | None = None,
        *,
        file: str | Path | None = None,
        json: str | Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Loads settings from all sources. If several give a setting, the first one in the order below wins.

        Args:
            overrides: explicit settings, e.g. from a command line.
            json: settings from an engine's own configuration, as JSON text or a parsed mapping.
            environ: variables `LMCACHE_<SETTING>` (default: this process's). An empty variable counts as unset.
            file: a YAML file of settings; if None, the one named by `LMCACHE_CONFIG_FILE`, if any.

        Raises:
            ConfigError: an unknown setting or invalid value; the message has its source.
        """
        environ = os.environ if environ is None else environ
        if file is not None and not str(file).strip():
            raise ConfigError(f"the settings file's name {str(file)!r} is empty; give its path, or None for no file")
        path = environ.get(FILE_VARIABLE, "").strip() if file is None else file
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        layers: list[Iterable[tuple[str, Any, str]]] = [
            _from_mapping(overrides or {}, "explicit"),
            _from_mapping(read_json(json), "engine JSON"),
            _from_environ(cls, environ),
            _from_mapping(read_yaml(Path(path), f"check {FILE_VARIABLE}"), f"file {path}") if path else (),
        ]
        ranks: dict[str, int] = {}
        for rank, layer in enumerate(layers):  # read each to its end, so that a typo is found even if it is overridden
            for name, value, source in layer:
                if name not in values:
                    values[name], sources[name], ranks[name] = value, source, rank
        if values.get("disk_path", "") is None and ranks["disk_path"] < ranks.get("disk_bytes", 0):
            del values["disk_bytes"], sources["disk_bytes"]  # a nearer source turned the tier off
        try:
            config = cls(**values)
        except ConfigError as error:  # every message starts with the setting's name
            name, _, reason = str(error).partition(":")
            raise ConfigError(f"{name} (from {sources.get(name, 'default')}):{reason}") from None
        config.__dict__["_sources"].update(sources)
        return config

    def source(self, name: str) -> str:
        """Returns where a setting came from: `default`, `explicit`, `engine JSON`, `env LMCACHE_…` or `file …`."""
        _refuse_unknown([name], "setting")
        sources: dict[str, str] = self.__dict__["_sources"]
        return sources.get(name, "default")

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns the `value` (JSON-able) and `source` of every setting."""
        return {
            s.name: {"value": str(value) if isinstance(value, Path) else value, "source": self.source(s.name)}
            for s in self.settings()
            for value in [getattr(self, s.name)]
        }


def _refuse_unknown(names: Iterable[str], what: str, prefix: str = "") -> None:
    known = [s.name for s in Config.settings()]
    for name in names:
        if name not in known:
            spelled = prefix + (name.upper() if prefix else name)
            bare = name.lower().removeprefix("lmcache.").removeprefix("lmcache_")
            near = [OTHERS[bare]] if bare in OTHERS else difflib.get_close_matches(bare, known, n=1, cutoff=0.5)
            shown = [prefix + (n.upper() if prefix else n) for n in near or known]
            hint = f"did you mean {shown[0]!r}?" if near else f"known: {', '.join(shown)}"
            raise ConfigError(f"unknown {what} {spelled!r}; {hint}")


def _from_mapping(values: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any, str]]:
    _refuse_unknown(map(str, values), "setting" if source == "explicit" else f"setting in {source}:")
    for name, value in values.items():
        yield name, value, source


def _from_environ(cls: type[Config], environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    kinds = {s.name: s.kind for s in cls.settings()}
    foreign = []
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE or is_service(variable, text):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in kinds and is_foreign(name, kinds):
            foreign.append(name)
            continue
        _refuse_unknown([name], "environment variable", PREFIX)
        if text.strip():
            yield name, kinds[name].from_text(text.strip()), f"env {variable}"
    warn_foreign(foreign, kinds)

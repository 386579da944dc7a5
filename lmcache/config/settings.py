"""The declaration of a setting: a descriptor with kind, default, unit and description, which validates assigned values.

`lmcache.config` declares the settings; the documentation page, `lmcache doctor` and error messages are generated from them.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

from lmcache.errors import ConfigError
from lmcache.observe.log import warning

T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)

UNITS = {"B": 1} | {
    f"{letter}{infix}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for infix, base in (("B", 1000), ("iB", 1024))
}

_QUOTES = "\"'\u201c\u201d\u2018\u2019"

_NOTHING = ("none", "null", "nil", "undefined", "false", "off")
"""Words by which templates and scripts mean that there is no path."""


def parse_size(value: object) -> int:
    """Parses bytes from an int, or from text with a unit: `"4GiB"` (2**30), `"500MB"` (10**6), `"1.5GiB"`, `"4096"`.

    Raises:
        ConfigError: anything else, including "4G" and "4gb", which are ambiguous.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"{value} is negative; give a number of bytes from 0 up, or text such as '4GiB'")
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{value!r} is not a size; give a whole number of bytes, or text such as '4GiB' or '500MB'")
    number, unit = match.groups()
    if unit and unit not in UNITS:
        near = [u for u in UNITS if u[0].lower() == unit[0].lower()]
        raise ConfigError(f"{value!r} has an unknown unit; write {' or '.join(number + u for u in near or ['GiB'])}")
    size = Fraction(number) * UNITS[unit or "B"]
    if size.denominator != 1:
        raise ConfigError(f"{value!r} is not a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """Returns the shortest exact text that `parse_size` parses back, e.g. `4GiB`, `500MB`, `1234567B`."""
    texts = [f"{size // scale}{unit}" for unit, scale in UNITS.items() if size % scale == 0] if size else ["0B"]
    return min(texts, key=len)


def named(name: str, known: Mapping[str, T], what: str) -> T:
    """Returns `known[name]`.

    Raises:
        ConfigError: no such name; the message has the nearest one.
    """
    if name not in known:
        lower = {key.lower(): key for key in known}
        near = [lower[key] for key in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)]
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown {what} {name!r}: {hint}Known: {', '.join(known)}")
    return known[name]


def path_of(value: object, noun: str) -> Path:
    """Returns a path that a person wrote, absolute, with `~` expanded. `noun`: "folder" or "file", for messages.

    Raises:
        ConfigError: no path, or a spelling that only a shell, a browser or a template engine understands: taken literally,
            it would be an odd name below whatever folder the process was started in.
    """
    text = str(value) if isinstance(value, (str, Path)) else ""
    if not text.strip() or (isinstance(value, Path) and not value.parts):
        raise ConfigError(f"{value!r} is not a path; give the {noun}'s name as text")
    advice = "give an absolute path, such as '/mnt/nvme/kv'"
    if text.lower() in _NOTHING:
        raise ConfigError(
            f"{text!r} would be a {noun} below the current one; leave it unset for none, or write './{text}'"
        )
    if re.match(r"[A-Za-z]:[\\/]", text):
        raise ConfigError(f"{text!r} is a path of Windows; {advice}")
    if match := re.match(r"file:/*|[A-Za-z][A-Za-z0-9+.-]*:/+", text, re.IGNORECASE):
        rest = "/" + text[match.end() :].removeprefix("localhost/")
        plain = match[0].lower().startswith("file:") and not rest.startswith("/~")
        raise ConfigError(f"{text!r} is a URL, not a path; " + (f"write {rest!r}" if plain else advice))
    if text != text.strip():
        raise ConfigError(f"{text!r} has white space around it; write {text.strip()!r}")
    if text[0] in _QUOTES or text[-1] in _QUOTES:
        raise ConfigError(f"{text!r} has quotes in it, which nothing has removed; write {text.strip(_QUOTES)!r}")
    if match := re.search(r"\$(?:\w+|[{(].*?[})]|[{(])|\{\{.*?\}\}|%\w+%|`", text):
        raise ConfigError(f"{text!r}: nothing has replaced {match[0]!r} in it; {advice}")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"{text!r} has a control character in it; {advice}")
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # "~user" of an unknown user; the current folder is gone
        raise ConfigError(f"{text!r}: {str(error).rstrip('.')}; {advice}") from None


def _stat(path: Path) -> os.stat_result | None:
    """Returns what is at `path`, or None if nothing is, or if that cannot be told before it is opened.

    Raises:
        ConfigError: a path that can never be opened.
    """
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ConfigError(f"{str(path)!r} cannot be a path ({error.strerror}); give another one") from None
        return None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be a path ({error}); give another one") from None


class Kind(Protocol[Out_co]):
    """The type of a setting: validates and parses its values."""

    @property
    def label(self) -> str:
        """The type as documentation shows it: `whole number`, `"lru" | "lfu"`, …"""
        ...

    def check(self, value: Any) -> Out_co:
        """Returns the value to use.

        Raises:
            ConfigError: invalid; the message has what would be valid, without the setting's name.
        """
        ...

    def from_text(self, text: str) -> Any:
        """Converts a value given as text (environment variable) for `check`; returns the text itself if it cannot."""
        ...


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; None: no upper limit."""

    low: int = 0
    high: int | None = None

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "whole number"

    def check(self, value: Any) -> int:
        """See `Kind`."""
        wanted = f"a whole number from {self.low} " + ("up" if self.high is None else f"to {self.high}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{value!r} is not {wanted}")
        if value < self.low or (self.high is not None and value > self.high):
            raise ConfigError(f"{value} is out of range; give {wanted}")
        return value

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def _above_zero(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{value!r} is not {what}")
    return float(value)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Seconds:
    """A finite number of seconds above 0."""

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "number"

    def check(self, value: Any) -> float:
        """See `Kind`."""
        return _above_zero(value, "a number of seconds above 0, such as 2.5")

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return _number(text)


@dataclass(frozen=True)
class Rate:
    """A finite number per second above 0, or None."""

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "number, or unset"

    def check(self, value: Any) -> float | None:
        """See `Kind`."""
        return None if value is None else _above_zero(value, "a number per second above 0, such as 8000")

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return _number(text)


@dataclass(frozen=True)
class Size:
    """A number of bytes, at least `low`. `auto` computes the value of the word `auto`."""

    low: int = 0
    auto: Callable[[], int] | None = None

    @property
    def label(self) -> str:
        """See `Kind`."""
        return 'size, or `"auto"`' if self.auto else "size"

    def check(self, value: Any) -> int:
        """See `Kind`."""
        if self.auto is not None and value == "auto":
            return self.auto()
        size = parse_size(value)
        if size < self.low:
            raise ConfigError(f"{value!r} is too small; give at least {format_size(self.low)}")
        return size

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclass(frozen=True)
class Choice(Generic[Out]):
    """One of a fixed set of words. `former` maps words of earlier releases to those that replace them."""

    options: tuple[Out, ...]
    former: Mapping[str, Out] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """See `Kind`."""
        return " | ".join(f'`"{o}"`' for o in self.options)

    def check(self, value: Any) -> Out:
        """See `Kind`."""
        for option in self.options:
            if type(value) is type(option) and value == option:
                return option
        if isinstance(value, str) and value in self.former:
            option = self.former[value]
            warning("setting-replaced", given=value, used=option)
            return option
        near = difflib.get_close_matches(str(value).lower(), map(str, self.options), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{value!r} is not one of {', '.join(map(repr, self.options))}{hint}")

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclass(frozen=True)
class Folder:
    """A folder, made absolute, or None. Whether it is usable is checked when it is opened."""

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "path, or unset"

    def check(self, value: Any) -> Path | None:
        """See `Kind`."""
        if value is None:
            return None
        path = path_of(value, "folder")
        found = _stat(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{str(value)!r} is a file; give a folder, which is created if it does not exist")
        return path

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclass(frozen=True)
class File:
    """A file's path as text, or None. Whether it can be written is checked when it is opened."""

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "path, or unset"

    def check(self, value: Any) -> str | None:
        """See `Kind`."""
        if value is None:
            return None
        found = _stat(path_of(value, "file"))
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{str(value)!r} is a folder; give a file in it, which is created if it does not exist")
        return str(value)

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclass(frozen=True)
class Text:
    """Non-empty text, or None."""

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "text, or unset"

    def check(self, value: Any) -> str | None:
        """See `Kind`."""
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{value!r} is not a non-empty text")
        return value

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return text


@dataclass(frozen=True)
class Flag:
    """A boolean."""

    @property
    def label(self) -> str:
        """See `Kind`."""
        return "`true` | `false`"

    def check(self, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise ConfigError(f"{value!r} is neither true nor false")
        return value

    def from_text(self, text: str) -> Any:
        """See `Kind`."""
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower(), text)


class Setting(Generic[In, Out]):
    """The declaration of one field of a frozen dataclass: its kind, default, unit and description.

    For type checkers the constructor takes `In` and the attribute is `Out` (e.g. a size is given as text and read as int).
    """

    name: str

    def __init__(self, kind: Kind[Out], default: In, *, unit: str = "", doc: str) -> None:
        self.kind = kind
        self.default = default
        self.unit = unit
        self.doc = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> In: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Out: ...
    def __get__(self, instance: object | None, owner: type) -> In | Out:
        if instance is None:
            return self.default  # `dataclass` reads the default this way; so may other code, e.g. `Config.chunk_tokens`
        value: Out = instance.__dict__[self.name]
        return value

    def __set__(self, instance: object, value: In) -> None:
        try:
            instance.__dict__[self.name] = self.kind.check(value)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

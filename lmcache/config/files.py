"""Reads settings from YAML files and engines' JSON, refusing what a reader and the parser would understand differently."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.errors import ConfigError

if TYPE_CHECKING:
    import yaml


def read_json(text: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Returns an engine's settings, given as JSON text or already parsed.

    Raises:
        ConfigError: not a JSON object, or a key is given twice.
    """
    if isinstance(text, str):
        try:
            text = json.loads(text, object_pairs_hook=_unique)
        except ValueError as error:
            raise ConfigError(f"the engine's JSON settings cannot be parsed: {error}") from None
        if not isinstance(text, dict):
            raise ConfigError(f"the engine's JSON settings must be an object such as {{...}}, not {text!r}")
    return text or {}


def read_yaml(path: Path, advice: str) -> Mapping[str, Any]:
    """Returns the settings in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, gives a key twice, or has a number that YAML 1.1 reads as octal
            (`010` is 8) or as sexagesimal (`1:30` is 90).
    """
    import yaml  # imported only if a file is used

    try:
        text = path.expanduser().read_text(encoding="utf-8")
        content = _parse(text)
    except OSError as error:
        raise ConfigError(f"settings file {str(path)!r} cannot be read ({error.strerror}); {advice}") from None
    except RuntimeError as error:  # "~user" of an unknown user
        raise ConfigError(f"settings file {str(path)!r} cannot be read ({error}); {advice}") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no UTF-8, a date such as 2026-99-99, \0 in the path
        raise ConfigError(f"settings file {str(path)!r} is not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"settings file {str(path)!r}: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"settings file {str(path)!r} must hold `name: value` lines, not {type(content).__name__}")
    return content or {}


def _parse(text: str) -> Any:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(node: yaml.Node) -> None:
    """Checks the keys and numbers of the settings, which are all on the first level."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    keys: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise ConfigError(f"{key.value!r} is given on line {keys[key.value]} and on line {line}; drop one")
            keys[key.value] = line
        if not isinstance(value, yaml.ScalarNode) or value.tag not in (
            "tag:yaml.org,2002:int",
            "tag:yaml.org,2002:float",
        ):
            continue
        if re.fullmatch(r"[-+]?0[0-7_]+", value.value) and value.value.strip("+-0_"):
            decimal, octal = (
                value.value.lstrip("+-0_").replace("_", ""),
                int(value.value.lstrip("+-").replace("_", ""), 8),
            )
            raise ConfigError(
                f"line {line}: {value.value} is octal in YAML, that is {octal}; write {decimal} or {octal}"
            )
        if ":" in value.value:
            raise ConfigError(f"line {line}: {value.value} is a number to the base 60 in YAML; write a decimal number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice; drop one")
        found[key] = value
    return found

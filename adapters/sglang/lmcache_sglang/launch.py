"""Builds the arguments that enable the backend, including SGLang's JSON options."""

from __future__ import annotations

import json
from typing import Any, Literal

from lmcache.config import Config
from lmcache.errors import ConfigError

BACKEND = {
    "backend_name": "lmcache",
    "module_path": "lmcache_sglang",
    "class_name": "LMCacheStorage",
    "interface_v1": 1,
}
"""Makes SGLang load `LMCacheStorage` and pass host memory instead of copies."""

OWN = (
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys",
)
"""Keys in the same JSON that SGLang consumes itself."""


LINKER = {"linker": "LMCacheLinker", "linker_module_path": "lmcache_sglang"}
"""Makes SGLang load `LMCacheLinker`."""

Interface = Literal["hicache", "linker"]
"""`hicache`: a storage backend below SGLang's own host memory. `linker`: copies directly between device memory and our tiers; its
keys are those of other engines, so `share="semantic"` works across engines."""


def extra_config(**settings: Any) -> str:
    """Returns the JSON for `--hicache-storage-backend-extra-config`: settings of `lmcache.Config`, and SGLang's own keys.

    Raises:
        ConfigError: an unknown or impossible setting.
    """
    ours = {name: value for name, value in settings.items() if name not in OWN}
    Config.load(ours)
    return json.dumps({**BACKEND, **{name: _plain(value) for name, value in settings.items()}})


def server_args(
    *, interface: Interface = "hicache", prefetch_threshold: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Returns keyword arguments for `sglang.Engine` that enable HiCache with this backend, or the linker.

    `Engine(model_path=…, **server_args(disk_path="/var/cache/lmcache"))`. SGLang's own HiCache options (`hicache_ratio`,
    `hicache_write_policy`, …) can be passed to `Engine` as well, if they are not among the returned arguments.

    Args:
        interface: which of SGLang's two interfaces to use, see `Interface`.
        prefetch_threshold: HiCache only: shorter hits, in tokens, are computed instead; SGLang's default is 256.
        **settings: of `lmcache.Config`; HiCache caches nothing without `disk_path`.

    Raises:
        ConfigError: an unknown or impossible setting.
    """
    if interface == "linker":
        if given := sorted({*OWN} & {*settings, *(["prefetch_threshold"] if prefetch_threshold is not None else [])}):
            raise ConfigError(f"{given[0]}: a setting of HiCache, which the linker does not use; leave it out")
        Config.load(settings)
        return {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                **LINKER,
                "linker_extra_config": {name: _plain(value) for name, value in settings.items()},
            },
        }
    if interface != "hicache":
        raise ConfigError(f"interface: {interface!r} is none of 'hicache', 'linker'")
    if prefetch_threshold is not None:
        settings["prefetch_threshold"] = prefetch_threshold
    return {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": extra_config(**settings),
    }


def usage() -> str:
    """Returns the help of `python -m lmcache_sglang`."""
    options = [
        ("interface NAME", "hicache (default) or linker"),
        *((f"{s.name.replace('_', '-')} VALUE", s.kind.label.replace("`", "")) for s in Config.settings()),
        *((f"{name.replace('_', '-')} VALUE", "SGLang's own, of HiCache") for name in OWN),
    ]
    return "\n".join(
        [
            "usage: python -m lmcache_sglang [--disk-path FOLDER] [SETTING ...] -- [SGLang's arguments]",
            "",
            "Runs SGLang's server with this cache, e.g.",
            "  python -m lmcache_sglang --disk-path /mnt/nvme/kv -- --model-path Qwen/Qwen3-8B",
            "",
            "Settings, which may also be given as LMCACHE_* or in a file (docs/configuration.md):",
            *(f"  --{option:<40} {about}" for option, about in options),
            "",
            "SGLang's own help: python -m lmcache_sglang -- --help",
        ]
    )


def split_command(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Splits `[--disk-path X …] -- [SGLang's arguments]` into settings and SGLang's arguments.

    Raises:
        ConfigError: an argument is not an option, an option has no value, or there is no `--`.
    """
    if "--" not in arguments:
        raise ConfigError("command line: put SGLang's own arguments after a `--`")
    at = arguments.index("--")
    settings: dict[str, Any] = {}
    known = {setting.name: setting.kind for setting in Config.settings()}
    rest = arguments[:at]
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--"):
            raise ConfigError(f"command line: {option!r} is no option; settings look like --disk-path FOLDER")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: {option} needs a value")
            text = rest.pop(0)
        if name == "interface":
            settings[name] = text
        elif name in OWN:
            try:
                settings[name] = json.loads(text)
            except ValueError:
                raise ConfigError(f"command line: {option} needs a number, true or false, not {text!r}") from None
        elif name in known:
            settings[name] = known[name].from_text(text)
        else:
            settings[name] = text  # `Config` raises, suggesting a similar setting
    return settings, arguments[at + 1 :]


def flags(**settings: Any) -> list[str]:
    """Returns `server_args` as command-line flags of `sglang serve` and `python -m sglang.launch_server`."""
    found: list[str] = []
    for name, value in server_args(**settings).items():
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(value if isinstance(value, str) else json.dumps(value))
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

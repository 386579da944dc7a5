"""docs/write-a-tier.md: the example tier passes the suite that the page recommends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lmcache_conformance.labs.tier_objects import object_id

PAGE = (Path(__file__).parents[2] / "docs/write-a-tier.md").read_text()
KEYS, EXAMPLE, SUITE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

_names: dict[str, Any] = {"__name__": __name__, "id": object_id(7)}
exec(compile(EXAMPLE + SUITE, "write-a-tier.md", "exec"), _names)
TestDictTier = _names["TestDictTier"]


def test_the_example_of_a_key_gives_the_id_back() -> None:
    exec(compile(KEYS, "write-a-tier.md", "exec"), dict(_names))

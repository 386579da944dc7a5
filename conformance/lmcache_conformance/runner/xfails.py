"""Known failures: a file of tests that are expected to fail, each with a link to its issue.

    # part of the test's id                  link to the issue
    TestMyTier::test_full_disk               https://github.com/me/mine/issues/7   # until the next release
    TestMyTier::test_ranges[big]             https://github.com/me/mine/issues/9

They are strict: a listed test that passes is a failure, so that entries of fixed bugs get removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"(?P<part>[^#\s][^#]*?)\s+(?P<link>https?://\S+)(?:\s+#\s*(?P<why>.*))?$")


class XfailError(ValueError):
    """A line of the file is malformed. The message names it and shows the format."""


@dataclass(frozen=True)
class Xfail:
    """Tests whose id contains `part` are expected to fail."""

    part: str
    link: str
    why: str = ""

    @property
    def reason(self) -> str:
        """The reason shown in the report."""
        return f"{self.why} ({self.link})" if self.why else self.link


def parse_xfails(text: str, source: str = "xfails") -> list[Xfail]:
    """Parses the file's text.

    Raises:
        XfailError: a line has no link, or something other than a comment after the link.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.match(stripped)
        if match is None:
            raise XfailError(
                f"{source}:{number}: {stripped!r} names no issue; a line is "
                "`part-of-the-test's-id  https://link-to-the-issue  # why`"
            )
        found.append(Xfail(match["part"], match["link"], (match["why"] or "").strip()))
    return found


def read_xfails(path: Path) -> list[Xfail]:
    """Reads and parses the file at `path`. Raises `XfailError` also if it cannot be read."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise XfailError(f"the list of known failures {str(path)!r} cannot be read: {error}") from None
    return parse_xfails(text, str(path))

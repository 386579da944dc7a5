"""`Layout`: the arrangement of each plane in an engine's memory, as axis strings. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmcache.errors import LayoutError
from lmcache.layout.axes import Axes


@dataclass(frozen=True)
class Layout:
    """The arrangement of each plane in an engine's memory. Created by `parse`; see `lmcache.layout.axes` for axis strings.

    Attributes:
        axes: one axis string for all planes, or (plane name, axis string) pairs.
        block_tokens: tokens per page; None = the extent of the tensor's `slot` dimension.
    """

    axes: str | tuple[tuple[str, str], ...]
    block_tokens: int | None = None

    @staticmethod
    def parse(axes: str | Mapping[str, str], *, block_tokens: int | None = None) -> Layout:
        """Checks and normalises axis strings. A single string applies to every plane.

        Raises:
            LayoutError: an axis is unknown, missing, duplicated or wrongly split; the message names it.
        """
        if block_tokens is not None and (type(block_tokens) is not int or block_tokens < 1):
            raise LayoutError(f"block_tokens must be a positive integer, not {block_tokens!r}")
        if isinstance(axes, str):
            strings = [str(Axes.parse(axes))]
            parsed: str | tuple[tuple[str, str], ...] = strings[0]
        elif isinstance(axes, Mapping) and axes:
            parsed = tuple((str(name), str(Axes.parse(text))) for name, text in axes.items())
            strings = [text for _, text in parsed]
        else:
            raise LayoutError(f"axes must be a string, or a mapping from plane name to string, not {axes!r}")
        for text in strings:
            names = Axes.parse(text).names
            factor = Axes.parse(text).factors.get("slot", 1)
            if block_tokens is not None and names & {"block", "batch"} and block_tokens % factor:
                raise LayoutError(
                    f"axes {text!r}: factor {factor} of axis 'slot' does not divide block_tokens={block_tokens}"
                )
            if "slot" not in names and block_tokens != 1:
                raise LayoutError(
                    f"axes {text!r}: axis 'slot' is missing; pages without it hold one token: block_tokens=1"
                )
        return Layout(parsed, block_tokens)

    def axes_of(self, plane: str) -> Axes:
        """Returns the axes of one plane; raises `LayoutError` if the layout has no such plane."""
        if isinstance(self.axes, str):
            return Axes.parse(self.axes)
        for name, text in self.axes:
            if name == plane:
                return Axes.parse(text)
        raise LayoutError(f"the layout describes planes {', '.join(n for n, _ in self.axes)}, but not {plane!r}")

    def describe(self) -> dict[str, object]:
        """Returns a JSON-serialisable description; `from_description` is the inverse."""
        return {
            "axes": self.axes if isinstance(self.axes, str) else dict(self.axes),
            "block_tokens": self.block_tokens,
        }

    @staticmethod
    def from_description(data: Mapping[str, Any]) -> Layout:
        """Creates a layout from the output of `describe`; raises `LayoutError` if `data` is not valid."""
        try:
            return Layout.parse(data["axes"], block_tokens=data["block_tokens"])
        except (KeyError, TypeError) as error:
            raise LayoutError(f"not a layout: {type(error).__name__}: {error}") from error

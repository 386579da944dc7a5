"""Memory layouts of KV: an engine's pages (`Layout`, `PagedKV`), an object's bytes (`ObjectLayout`), and copies between them.

Only `gather` and `scatter` read and write an engine's memory; `translate` converts an object from one layout to another.
"""

from lmcache.layout.axes import Axes
from lmcache.layout.bound import BoundGroup, BoundKV
from lmcache.layout.description import Layout
from lmcache.layout.move import gather, scatter, translate
from lmcache.layout.objects import ObjectLayout, ObjectPlane, SegmentSpan
from lmcache.layout.paged import PagedKV
from lmcache.layout.slots import validate_slots

__all__ = [
    "Axes",
    "BoundGroup",
    "BoundKV",
    "Layout",
    "ObjectLayout",
    "ObjectPlane",
    "PagedKV",
    "SegmentSpan",
    "gather",
    "scatter",
    "translate",
    "validate_slots",
]

"""The file format is frozen: its documentation page is accurate, and files of the first release stay readable."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from lmcache.format.file import FORMAT, Form, Header, PlaneForm, Segment, SegmentSpan, decode_header, verify_file
from lmcache_conformance.labs.tier_objects import FORM, object_id, pattern, payload_of, stored_form

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/file-format.md").read_text()
GOLDEN = Path(__file__).parent / "golden"
ID = object_id(3)
NATIVE = Form(
    order="native",
    planes=[PlaneForm(name, "bfloat16", (2, 24, 2, 8), "layer block head slot (kv dim)", 8) for name in ("k", "v")],
    spans=[SegmentSpan(("k", "v"), layer, 1536 * layer, 1536) for layer in range(2)],
    isa="test-isa",
)
CASES = {"canonical": (FORM, ID), "native": (NATIVE, ID._replace(tokens=24))}


@pytest.fixture(scope="module")
def page() -> dict[str, Callable[..., Any]]:
    """The functions of the reader on the documentation page; it may use the standard library only."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    imports = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    assert imports == ["json", "struct"]
    names: dict[str, Any] = {}
    exec(compile(code, "file-format.md", "exec"), names)
    return names


@pytest.mark.parametrize("order", CASES)
@pytest.mark.parametrize("xxh3", [None, xxhash.xxh3_128_hexdigest])
def test_the_pages_reader_reads_what_we_write(
    page: dict[str, Callable[..., Any]], tmp_path: Path, order: str, xxh3: Any
) -> None:
    form, id = CASES[order]
    path = tmp_path / "x"
    path.write_bytes(stored_form(id, form))
    header, payload = page["read_object"](path, xxh3)
    assert payload == payload_of(id, form)
    assert header == json.loads(json.dumps(_plain(verify_file(path, id))))
    if order == "canonical":
        half = form.nbytes // 2
        assert page["plane_bytes"](header, payload, "k", 0) == payload[: half // 2]
        assert page["plane_bytes"](header, payload, "v", 1) == payload[half + half // 2 :]


def test_the_pages_reader_refuses_damage(page: dict[str, Callable[..., Any]], tmp_path: Path) -> None:
    data = stored_form(ID)
    path = tmp_path / "x"
    flipped = [_flip(data, bit) for bit in (20, 8 * 4090, 8 * FORM.payload_offset, 8 * len(data) - 1)]
    for bad in (b"", data[:7], data[:4000], data[: FORM.payload_offset], data[:-1], *flipped):
        path.write_bytes(bad)
        with pytest.raises(ValueError):  # noqa: PT011 (JSON errors are ValueErrors as well)
            page["read_object"](path, xxhash.xxh3_128_hexdigest)


def test_the_page_names_every_field_and_no_other() -> None:
    table = PAGE[PAGE.index("| field |") : PAGE.index("Integers are in")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(Header.__struct_fields__)
    planes = PAGE[PAGE.index("**Planes.**") : PAGE.index("**Segments.**")]
    assert set(PlaneForm.__struct_fields__) <= set(re.findall(r"`(\w+)`", planes))
    segments = PAGE[PAGE.index("**Segments.**") : PAGE.index("**Digest.**")]
    assert set(Segment.__struct_fields__) <= set(re.findall(r"`(\w+)`", segments))
    assert f"format **{FORMAT}**" in PAGE


@pytest.mark.parametrize("order", CASES)
def test_files_written_by_the_first_release_are_still_read(order: str) -> None:
    form, id = CASES[order]
    path = GOLDEN / f"format-1-{order}.safetensors"
    header = verify_file(path, id)
    data = path.read_bytes()
    assert data[form.payload_offset : form.payload_offset + form.nbytes] == payload_of(id, form)
    assert header.format == 1
    assert header.order == order
    assert header.parent == pattern("parent", 32).hex()
    assert header.tokens == (1000, 1000 + id.tokens)
    assert header.position0 == 5


@pytest.mark.parametrize("order", CASES)
def test_what_is_written_today_differs_from_the_first_release_in_nothing_but_the_write(order: str) -> None:
    form, id = CASES[order]
    old = (GOLDEN / f"format-1-{order}.safetensors").read_bytes()
    new = golden(order)
    assert len(new) == len(old)
    assert new[form.payload_offset :] == old[form.payload_offset :]
    written = [_plain(decode_header(data, id)) for data in (old, new)]
    for fields in written:
        del fields["write_id"], fields["digest"]
    assert written[0] == written[1], "another header is another format: bump FORMAT, and keep reading the old one"


def golden(order: str) -> bytes:
    """Creates the content of a golden file."""
    form, id = CASES[order]
    payload = memoryview(payload_of(id, form))
    return b"".join(form.encode(id, payload, parent=pattern("parent", 32), first_token=1000, position0=5))


def _plain(header: Header) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(header)
    return plain


def _flip(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)

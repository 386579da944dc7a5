"""Object files: valid safetensors files, whose bytes are used only after verification."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lmcache.errors import FormatError, FormatVersionError
from lmcache.format.file import (
    ALIGN,
    MAX_HEADER,
    Form,
    PlaneForm,
    SegmentSpan,
    canonical_form,
    decode_header,
    header_bytes,
    verify,
    verify_file,
)
from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout
from lmcache.spec import KVSpec, LayerGroup, Plane, Rect
from lmcache_conformance.labs.tier_objects import (
    FORM,
    OTHER_NAMESPACE,
    SPEC,
    TOKENS,
    forge,
    object_id,
    pattern,
    payload_of,
    stored_form,
)

ID = object_id(3)


def native_form(sizes: list[int], **kwargs: object) -> Form:
    spans, at = [], 0
    for layer, size in enumerate(sizes):
        spans.append(SegmentSpan(("k", "v"), layer, at, size))
        at += size
    planes = [PlaneForm(name, "bfloat16", (len(sizes), 8, 1, 8), "head slot dim", 8) for name in ("k", "v")]
    return Form(order="native", planes=planes, spans=spans, isa="x")


# ---------------------------------------------------------------- as safetensors


def test_safetensors_shows_each_plane_of_a_canonical_object_with_its_values(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(stored_form(ID))
    payload = torch.frombuffer(bytearray(payload_of(ID)), dtype=torch.uint8)
    k, v = payload.chunk(2)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"k", "v"}
        for name, raw in (("k", k), ("v", v)):
            tensor = file.get_tensor(name)
            assert tensor.dtype is torch.bfloat16
            assert tensor.shape == (2, TOKENS, 2, 16)
            assert torch.equal(tensor.contiguous().view(torch.uint8).flatten(), raw)
        assert json.loads(file.metadata()["lmcache"])["chain"] == ID.chain.hex()


def test_safetensors_shows_a_native_object_as_bytes(tmp_path: Path) -> None:
    form = native_form([300, 300])
    path = tmp_path / "x.safetensors"
    path.write_bytes(stored_form(ID, form))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"__native__", "__pad__"}
        assert bytes(file.get_tensor("__native__").numpy()) == payload_of(ID, form)
        assert not file.get_tensor("__pad__").any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8_e4m3fn", "float8_e8m0fnu", "float8_e5m2fnuz"])
def test_safetensors_opens_planes_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    planes = (Plane("latent", dtype, 24), Plane("scale", "float32", 1))
    spec = KVSpec.of_groups("m", [LayerGroup("mla", (0, 1, 2), planes, 1)])
    form = canonical_form(spec, 0, 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(stored_form(ID, form))
    with safe_open(path, "pt") as file:
        latent, scale = file.get_tensor("latent"), file.get_tensor("scale")
    assert latent.numel() * latent.element_size() == 3 * 8 * 24 * planes[0].itemsize
    assert scale.shape == (3, 8, 1, 1)
    data = latent.contiguous().view(torch.uint8).flatten().numpy().tobytes() + scale.numpy().tobytes()
    assert data == payload_of(ID, form)


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 10_000])
def test_payload_and_file_end_at_page_boundaries(nbytes: int) -> None:
    form = native_form([nbytes])
    data = stored_form(ID, form)
    assert len(data) == form.stored_bytes
    assert len(data) % ALIGN == 0
    assert form.payload_offset % ALIGN == 0
    assert header_bytes(data) == form.payload_offset
    assert data[form.payload_offset :] == payload_of(ID, form) + bytes(-nbytes % ALIGN)


# ---------------------------------------------------------------- round trip


@settings(max_examples=60, deadline=None)
@given(
    namespace=st.binary(min_size=32, max_size=32),
    chain=st.binary(min_size=32, max_size=32),
    parent=st.none() | st.binary(min_size=32, max_size=32),
    group=st.integers(0, 100),
    first=st.integers(0, 2**40),
    position0=st.integers(0, 2**40),
    depth=st.integers(0, 2**60),
    low=st.integers(0, 1000),
)
def test_a_header_gives_back_what_it_was_given(
    namespace: bytes,
    chain: bytes,
    parent: bytes | None,
    group: int,
    first: int,
    position0: int,
    depth: int,
    low: int,
) -> None:
    id = ObjectId(namespace, chain, group, Rect((low, low + 2), (low, low + 3)), TOKENS, depth)
    payload = memoryview(pattern(0, FORM.nbytes))
    parts = FORM.encode(id, payload, parent=parent, first_token=first, position0=position0)
    header = decode_header(b"".join(parts), id)
    assert header.id == id
    assert header.parent == (parent.hex() if parent else None)
    assert header.tokens == (first, first + TOKENS)
    assert header.position0 == position0
    assert header.order == "canonical"
    assert header.isa == "test-isa"
    assert header.raw_bytes == header.payload_bytes == FORM.nbytes
    assert [(s.planes, s.layer, s.offset, s.stored) for s in header.segments] == list(FORM.spans)
    assert len(parts[0]) == FORM.payload_offset, "a reader with the same form knows where the payload starts"
    verify(header, payload)


def test_text_in_a_header_survives_quoting() -> None:
    axes = 'quotes " and \\ and \n and ü and 雪 and {braces} and %s'
    plane = PlaneForm("k", "int8", (1, 8, 1, 1), axes, 8)
    form = Form(order="native", planes=[plane], spans=[SegmentSpan(("k",), 0, 0, 8)], isa='isa "x"')
    header = decode_header(stored_form(ID, form), ID)
    assert header.planes == (plane,)
    assert header.isa == 'isa "x"'


def test_encoding_copies_no_payload() -> None:
    payload = memoryview(bytearray(payload_of(ID)))
    parts = FORM.encode(ID, payload)
    assert any(isinstance(part, memoryview) and part.obj is payload.obj for part in parts)


def test_two_writes_of_one_object_have_different_write_ids() -> None:
    ids = {decode_header(stored_form(ID), ID).write_id for _ in range(5)}
    assert len(ids) == 5


def test_a_payload_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(FormatError, match=f"{FORM.nbytes - 1} bytes"):
        FORM.encode(ID, memoryview(bytes(FORM.nbytes - 1)))


def test_a_digest_that_is_too_long_or_empty_is_refused() -> None:
    payload = memoryview(bytes(FORM.nbytes))
    for id in (ID._replace(namespace=bytes(33)), ID._replace(chain=b"")):
        with pytest.raises(FormatError, match="1 to 32 bytes"):
            FORM.encode(id, payload)


def test_a_form_with_a_gap_or_foreign_plane_is_refused() -> None:
    planes = [PlaneForm("k", "int8", (1, 8), "slot", 8)]
    with pytest.raises(FormatError, match="start at 8"):
        Form(order="native", planes=planes, spans=[SegmentSpan(("k",), 0, 0, 8), SegmentSpan(("k",), 1, 9, 8)])
    with pytest.raises(FormatError, match="planes"):
        Form(order="native", planes=planes, spans=[SegmentSpan(("v",), 0, 0, 8)])
    with pytest.raises(FormatError, match="can't fill"):
        Form(order="canonical", planes=planes, spans=[SegmentSpan(("k",), 0, 0, 9)])
    spans = [SegmentSpan(("k",), 0, 0, 8), SegmentSpan(("k", "v"), 1, 8, 8)]
    with pytest.raises(FormatError, match="the planes hold 8 bytes, the segments 16"):
        Form(order="canonical", planes=[planes[0], PlaneForm("v", "int8", (1, 8), "slot", 8)], spans=spans)
    with pytest.raises(FormatError, match="fewer, larger segments"):
        native_form([1] * 20_000)


# ---------------------------------------------------------------- damage


def test_every_single_flipped_bit_of_the_header_is_found() -> None:
    data = bytearray(stored_form(ID))
    size = header_bytes(data)
    assert size == 4096
    for bit in range(8 * size):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_header(data, ID)
        data[bit // 8] ^= 1 << bit % 8
    decode_header(data, ID)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 8 * FORM.nbytes - 1))
def test_a_flipped_bit_of_the_payload_is_found_and_its_segment_named(bit: int) -> None:
    data = bytearray(stored_form(ID))
    payload = memoryview(data)[FORM.payload_offset :]
    header = decode_header(data, ID)
    payload[bit // 8] ^= 1 << bit % 8
    index = next(i for i, s in enumerate(header.segments) if s.offset <= bit // 8 < s.offset + s.stored)
    hurt = header.segments[index]
    with pytest.raises(FormatError, match=rf"segment of {hurt.planes[0]}, layer {hurt.layer}: its checksum"):
        verify(header, payload)
    with pytest.raises(FormatError, match="checksum"):
        verify(header, payload, range(index, index + 1))
    for other in range(len(header.segments)):
        if other != index:
            verify(header, payload, range(other, other + 1))


def test_a_payload_cut_short_is_found_at_any_length() -> None:
    data = stored_form(ID)
    header = decode_header(data, ID)
    payload = memoryview(data)[FORM.payload_offset : FORM.payload_offset + FORM.nbytes]
    for length in [*range(0, FORM.nbytes, 97), FORM.nbytes - 1]:
        with pytest.raises(FormatError, match="bytes"):
            verify(header, payload[:length])


def test_a_header_cut_short_is_found_at_any_length() -> None:
    data = stored_form(ID)
    for length in range(header_bytes(data)):
        with pytest.raises(FormatError):
            decode_header(data[:length], ID)


@pytest.mark.parametrize("claim", [0, 1, 4088 + 1, MAX_HEADER, 2**30, 2**31 - 8, 2**63, 2**64 - 8, 2**64 - 1])
def test_an_impossible_header_length_is_refused_before_anything_is_parsed(claim: int) -> None:
    data = claim.to_bytes(8, "little") + stored_form(ID)[8:]
    with pytest.raises(FormatError, match="header of"):
        decode_header(data, ID)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=5000) | st.binary(max_size=5000).map(lambda b: (4088).to_bytes(8, "little") + b.ljust(4088)))
def test_arbitrary_bytes_are_never_more_than_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_header(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*decode_header(stored_form(ID)).__struct_fields__, "new"]), _JSON, min_size=1))
def test_a_header_with_any_field_replaced_is_read_strictly_or_refused(change: dict[str, object]) -> None:
    try:
        header = decode_header(forge(stored_form(ID), change))
    except FormatError:
        return
    assert "new" not in change
    assert header.payload_bytes == sum(segment.stored for segment in header.segments)


def test_deeply_nested_json_is_refused() -> None:
    text = b"[" * 4000
    with pytest.raises(FormatError, match="damaged"):
        decode_header((4088).to_bytes(8, "little") + text.ljust(4088))


# ---------------------------------------------------------------- well-formed but not acceptable


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (object_id(4), object_id(4).chain.hex()[:16]),
        (ID._replace(namespace=OTHER_NAMESPACE), OTHER_NAMESPACE.hex()[:16]),
        (ID._replace(group=1), "group 1"),
        (ID._replace(rect=Rect((0, 2), (1, 2))), r"heads \[1,2\)"),
        (ID._replace(rect=Rect((1, 2), (0, 2))), r"layers \[1,2\)"),
        (ID._replace(tokens=8), "8 tokens"),
        (ID._replace(depth=2), "depth 2"),
    ],
)
def test_another_objects_file_is_refused_and_both_are_named(other: ObjectId, named: str) -> None:
    with pytest.raises(FormatError, match=f"not .*{named}"):
        decode_header(stored_form(ID), other)
    with pytest.raises(FormatError, match=f"holds .*{named}"):
        decode_header(stored_form(other._replace(tokens=TOKENS)), ID) if other.tokens == TOKENS else decode_header(
            forge(stored_form(ID), {"tokens": [0, 8]}), ID
        )


def test_a_newer_format_asks_for_an_upgrade_whatever_it_changed() -> None:
    for change in ({"format": 2}, {"format": 7, "new": "field"}, {"format": 2, "segments": "elsewhere"}):
        with pytest.raises(FormatVersionError, match=rf"format {change['format']}, this release reads ≤ 1: upgrade"):
            decode_header(forge(stored_form(ID), change), ID)
    with pytest.raises(FormatVersionError):
        decode_header(forge(stored_form(ID), {"format": 2}, drop="chain"), ID)


def test_an_unknown_field_codec_or_order_is_refused() -> None:
    data = stored_form(ID)
    segments = json.loads(json.loads(data[8 : header_bytes(data)])["__metadata__"]["lmcache"])["segments"]
    zstd = [dict(segment, codec="zstd") for segment in segments]
    short = [dict(segment, raw=segment["raw"] + 1) for segment in segments]
    for change in ({"extra": 1}, {"order": "sideways"}, {"segments": zstd}, {"segments": short}, {"digest2": "x"}):
        with pytest.raises(FormatError):
            decode_header(forge(data, change), ID)


def test_segments_that_do_not_cover_the_payload_are_refused() -> None:
    data = stored_form(ID)
    segments = json.loads(json.loads(data[8 : header_bytes(data)])["__metadata__"]["lmcache"])["segments"]
    shifted = [segments[0], dict(segments[1], offset=segments[1]["offset"] + 1), *segments[2:]]
    huge = [dict(segments[0], raw=2**62, stored=2**62)]
    for change in (
        {"segments": segments[1:]},
        {"segments": segments[:-1]},
        {"segments": [segments[0], *segments]},
        {"segments": shifted},
        {"segments": huge},
        {"segments": []},
        {"payload_bytes": 2**63 - 1},
        {"payload_bytes": FORM.nbytes - 1},
        {"tokens": [5, 5]},
        {"layers": [2, 0]},
    ):
        with pytest.raises(FormatError):
            decode_header(forge(data, change), ID)


def test_a_safetensors_file_of_someone_else_is_refused() -> None:
    for text in (b"{}", b'{"__metadata__":{"format":"pt"}}', b'{"__metadata__":{"lmcache":""}}', b"null", b"[]"):
        with pytest.raises(FormatError, match="damaged"):
            decode_header((4088).to_bytes(8, "little") + text.ljust(4088))


# ---------------------------------------------------------------- whole files


def test_verify_file_accepts_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    form = native_form([5000, 6000])
    path, data = tmp_path / "x", stored_form(ID, form)
    path.write_bytes(data)
    assert verify_file(path, ID).id == ID
    assert verify_file(path).id == ID
    end = form.payload_offset + form.nbytes
    assert end < len(data)
    rng = random.Random(0)
    damaged = {
        "empty": b"",
        "one byte": data[:1],
        "no payload": data[: form.payload_offset],
        "one byte short": data[:-1],
        "longer": data + b"\0",
        "another page": data + bytes(ALIGN),
        "flip in the tail": _flipped(data, rng.randrange(8 * end, 8 * len(data))),
        "flip in the first segment": _flipped(data, 8 * form.payload_offset),
        "flip in the last segment": _flipped(data, 8 * end - 1),
        "flip in the header": _flipped(data, 8 * 100),
        "payload zeroed": data[: form.payload_offset] + bytes(form.nbytes + form.pad),
    }
    for what, bad in damaged.items():
        path.write_bytes(bad)
        with pytest.raises(FormatError):
            raise AssertionError(f"{what}: {verify_file(path, ID)}")
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not chunk"):
        verify_file(path, object_id(9))
    with pytest.raises(FileNotFoundError):
        verify_file(tmp_path / "absent")


def test_a_header_longer_than_the_probe_is_read_whole(tmp_path: Path) -> None:
    form = native_form([8] * 1000)
    assert form.payload_offset > 64 << 10
    path = tmp_path / "x"
    path.write_bytes(stored_form(ID, form))
    assert len(verify_file(path, ID).segments) == 1000


def _flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_the_canonical_form_is_that_of_the_canonical_layout() -> None:
    layout = ObjectLayout.canonical(SPEC, 0, TOKENS)
    header = decode_header(stored_form(ID), ID)
    assert json.loads(json.dumps(header.layout)) == layout.describe()
    assert ObjectLayout.from_description(header.layout) == layout
    assert [(s.planes, s.layer, s.offset, s.nbytes) for s in layout.segments()] == list(FORM.spans)


def test_the_canonical_form_has_the_size_the_spec_says() -> None:
    assert FORM.nbytes == SPEC.object_bytes(0, TOKENS)
    shard = SPEC.shard(layers=(1, 2), tp_rank=1, tp_size=2)
    assert canonical_form(shard, 0, TOKENS).nbytes == shard.object_bytes(0, TOKENS)


def test_a_huge_sparse_file_is_verified_in_little_memory(tmp_path: Path) -> None:
    """Its header claims one segment of 512 MiB; the file takes no space."""
    size = 512 << 20
    form = native_form([8])
    data = stored_form(ID, form)
    header = decode_header(data)
    segments = [json.loads(msgspec.json.encode(header.segments[0])) | {"raw": size, "stored": size}]
    data = forge(data, {"payload_bytes": size, "segments": segments})[: header_bytes(data)]
    path = tmp_path / "x"
    path.write_bytes(data)
    os.truncate(path, len(data) + size)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="its checksum does not match"):
            verify_file(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", ["fifo", "link", "folder"])
def test_verify_file_reads_regular_files_only(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "link":
        (tmp_path / "y").write_bytes(stored_form(ID))
        path.symlink_to(tmp_path / "y")
    else:
        path.mkdir()
    with pytest.raises((FormatError, OSError)):
        verify_file(path)

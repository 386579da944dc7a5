"""Special cases of host copies: adjacent pages in any order, buffers between pools, threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache.layout.host
import lmcache.layout.move
import lmcache_kernels.reference
from lmcache.layout import BoundKV, Layout, ObjectLayout, PagedKV, gather, scatter
from lmcache.layout.host import by_neighbours
from lmcache_conformance.labs.engine_layouts import LABS, Lab, kv_spec

NAMES = [
    "vllm packed LBHNC",
    "vllm packed BLNHC",
    "vllm packed BHLNC",
    "flash attention",
    "sglang mha",
    "vllm cpu amx",
    "hf",
]


def bind(lab: Lab) -> BoundKV:
    return PagedKV(lab.tensors, Layout.parse(lab.axes, block_tokens=lab.block_tokens)).bind(lab.spec)  # type: ignore[arg-type]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Makes small copies take the code paths of large ones; records the gathers by `by_neighbours`."""
    taken: list[int] = []

    def counted(copy: object) -> object:
        puts = by_neighbours(copy)  # type: ignore[arg-type]
        if puts is not None:
            taken.append(len(puts))
        return puts

    monkeypatch.setattr(lmcache.layout.host, "_MIN_GATHER_BYTES", 0)
    monkeypatch.setattr(lmcache.layout.host, "_BYTES_PER_PUT", 0)
    monkeypatch.setattr(lmcache.layout.move, "by_neighbours", counted)
    monkeypatch.setattr(lmcache_kernels.reference, "_MIN_PARALLEL_BYTES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield taken
    torch.set_num_threads(threads)


@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_neighbours_in_any_order_are_gathered_right(name: str, spread: int, eager: list[int]) -> None:
    lab = LABS[name]()
    lab.randomize(0)
    kv = bind(lab)
    block = lab.block_tokens or 4
    tokens = 2 * block if block < 16 else block
    for seed in range(3):
        pages = torch.randperm(lab.num_slots // block, generator=torch.Generator().manual_seed(seed))
        slots = (pages[:, None] * block + torch.arange(block)).reshape(-1)
        slots = slots[: len(slots) // tokens * tokens]
        count = len(slots) // tokens
        for layout in (kv.native(0, tokens), ObjectLayout.canonical(lab.spec, 0, tokens)):
            memory = torch.zeros(count * (layout.nbytes + spread), dtype=torch.uint8)
            outs = [part[: layout.nbytes] for part in memory.split(layout.nbytes + spread)]
            gather(kv, 0, slots, outs, layout)
            again = [
                torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in outs
            ]  # isolated pages: too few adjacent ones
            for i, one in enumerate(again):
                gather(kv, 0, slots[i * tokens : (i + 1) * tokens], [one], layout)
            assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))
            if layout.order == "canonical":
                assert torch.equal(outs[1], lab.canonical(slots[tokens : 2 * tokens]))
            assert not any(part[layout.nbytes :].any() for part in memory.split(layout.nbytes + spread))
    assert eager or name in ("hf", "vllm packed BHLNC")


@pytest.mark.parametrize("places", [[0, 1, 2], [0, 2, 3], [2, 1, 0], [1, 0, 2], [0, 2, 4]])
@pytest.mark.parametrize("gap", [0, 1, 48])
def test_buffers_may_lie_anywhere_in_an_arena(places: list[int], gap: int) -> None:
    """In order, with a hole, reversed, shuffled, every second one; also at odd distances."""
    lab = LABS["vllm packed LBHNC"]()
    lab.randomize(0)
    kv = bind(lab)
    layout = ObjectLayout.canonical(lab.spec, 0, 8)
    slots = torch.randperm(lab.num_slots)[:24]
    arena = torch.zeros(5 * (layout.nbytes + gap), dtype=torch.uint8)
    every = [part[: layout.nbytes] for part in arena.split(layout.nbytes + gap)]
    chosen = [every[place] for place in places]
    gather(kv, 0, slots, chosen, layout)
    wanted = [lab.canonical(slots[i * 8 : (i + 1) * 8]) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(chosen, wanted, strict=True))
    assert int((arena != 0).sum()) == sum(int((want != 0).sum()) for want in wanted)
    lab.randomize(1)
    scatter(chosen, layout, kv, 0, slots)
    assert all(torch.equal(lab.canonical(slots[i * 8 : (i + 1) * 8]), want) for i, want in enumerate(wanted))


def test_runs_are_read_whole_and_order_is_kept_as_it_is(eager: list[int]) -> None:
    lab = LABS["vllm packed LBHNC"]()  # 7 blocks of 4, all layers at equal distances in one storage
    kv = bind(lab)
    layout = kv.native(0, 4)
    memory = torch.zeros(5, layout.nbytes, dtype=torch.uint8)

    def runs(pages: list[int]) -> list[int]:
        eager.clear()
        slots = (torch.tensor(pages)[:, None] * 4 + torch.arange(4)).reshape(-1)
        gather(kv, 0, slots, list(memory[: len(pages)]), layout)
        return list(eager)

    assert runs([5, 4, 3, 2, 1]) == [1]
    assert runs([6, 1, 2, 0, 5]) == [2]
    assert runs([0, 2, 4, 6]) == [4]
    assert runs([1, 2, 3, 4, 5]) == []  # in order: no gain


@pytest.mark.parametrize("axes", ["block slot head (kv dim)", "kv block slot head dim", "block kv head slot dim"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_buffer_between_the_pools_of_the_layers_is_written_and_read_right(axes: str, data: st.DataObject) -> None:
    """Pools and buffer are cut from one memory, in any order; the bytes between them stay unchanged."""
    layers, blocks, tokens, objects = 3, 6, 4, 2
    spec = kv_spec(torch.bfloat16, layers=layers)
    shape = {"block slot head (kv dim)": (6, 4, 2, 16), "kv block slot head dim": (2, 6, 4, 2, 8)}.get(
        axes, (6, 2, 2, 4, 8)
    )
    size = blocks * 4 * 2 * 16 * 2
    kv_layout = Layout.parse(axes, block_tokens=4)
    nbytes = objects * spec.object_bytes(0, tokens)
    pieces = data.draw(st.permutations(["buffer", 0, 1, 2]))
    gaps = [16 * data.draw(st.integers(0, 3)) for _ in pieces]
    memory = torch.randint(0, 256, (layers * size + nbytes + sum(gaps) + 16,), dtype=torch.uint8)
    memory = memory[(-memory.data_ptr()) % 16 :]
    at, start = {}, 0
    for piece, gap in zip(pieces, gaps, strict=True):
        length = nbytes if piece == "buffer" else size
        at[piece] = memory[start : start + length]
        start += length + gap
    pools = [at[i].view(torch.bfloat16).view(shape) for i in range(layers)]
    kv = PagedKV(pools, kv_layout).bind(spec)
    layout = data.draw(st.sampled_from([kv.native(0, tokens), ObjectLayout.canonical(spec, 0, tokens)]))
    slots = torch.tensor(data.draw(st.permutations(range(blocks))))[:objects, None] * 4 + torch.arange(4)
    slots = slots.reshape(-1)
    if data.draw(st.booleans()):
        slots = torch.randperm(24, generator=torch.Generator().manual_seed(1))[: objects * tokens]

    far = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(objects)]
    lonely = PagedKV([pool.clone() for pool in pools], kv_layout).bind(spec)
    gather(lonely, 0, slots, far, layout)
    before = memory.clone()
    near = list(at["buffer"].view(objects, -1))
    gather(kv, 0, slots, near, layout)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
    expected = before.clone()
    offset = at["buffer"].data_ptr() - memory.data_ptr()
    expected[offset : offset + nbytes] = torch.cat(far)
    assert torch.equal(memory, expected)

    skipped = torch.tensor([data.draw(st.integers(0, 2)) == 0 for _ in slots])
    named = torch.where(skipped, -1, slots)
    at["buffer"].copy_(~at["buffer"])
    wanted = [pool.clone() for pool in pools]
    scatter([~f for f in far], layout, PagedKV(wanted, kv_layout).bind(spec), 0, named)
    expected = memory.clone()
    for i, pool in enumerate(wanted):
        offset = at[i].data_ptr() - memory.data_ptr()
        expected[offset : offset + size] = pool.view(-1).view(torch.uint8)
    scatter(near, layout, kv, 0, named)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_a_scatter_and_miss_nothing(name: str, eager: list[int]) -> None:
    lab = LABS[name]()
    kv = bind(lab)
    tokens = lab.block_tokens or 4
    layout = kv.native(0, tokens)
    slots = torch.randperm(lab.num_slots // tokens)[:3, None] * tokens + torch.arange(tokens)
    slots = slots.reshape(-1)
    lab.randomize(1)
    srcs = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(3)]
    gather(kv, 0, slots, srcs, layout)
    lab.randomize(2)
    torch.set_num_threads(1)
    scatter(srcs, layout, kv, 0, slots)
    want = [storage.clone() for storage in lab.storages()]
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        lab.randomize(2)
        scatter(list(torch.cat(srcs).view(3, -1)), layout, kv, 0, slots)
        assert all(torch.equal(a, b) for a, b in zip(lab.storages(), want, strict=True))


def test_a_failure_on_a_helper_thread_is_raised_by_the_caller() -> None:
    def fail() -> None:
        raise ValueError("from a helper")

    done: list[int] = []
    with pytest.raises(ValueError, match="from a helper"):
        lmcache_kernels.reference.in_parallel([lambda: done.append(1), fail, lambda: done.append(2)])
    assert sorted(done) == [1, 2]
    lmcache_kernels.reference.in_parallel([])

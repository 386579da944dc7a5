"""Admission rules: what they admit, what they remember, and that both are bounded."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.config import Config
from lmcache.control.admission import Admission
from lmcache.control.admission.ghost import BloomFilter, GhostCache, Verdict, sampled
from lmcache.control.admission.rules import Adaptive, BreakEven, SecondHit
from lmcache.errors import ConfigError
from lmcache.plan import Name, TierFacts
from lmcache.spec import ALL, KVSpec, LayerGroup, Plane, trailing
from lmcache.transfer.tier_stats import Meter


def digest(i: int) -> bytes:
    return random.Random(i).randbytes(32)


def name(i: int, group: int = 0, depth: int = 0) -> Name:
    return Name(b"n" * 32, digest(i), group, 256, depth)


def full(tier: int) -> bool:
    return False


def not_full(tier: int) -> bool:
    return True


# ------------------------------------------------------------ Bloom filter and ghost cache


@given(st.lists(st.integers(0, 400), max_size=300))
def test_a_filter_never_forgets_its_last_digests(order: list[int]) -> None:
    marks = BloomFilter(64)
    for at, i in enumerate(order):
        known = marks.add(digest(i))
        if i in order[max(0, at - 64) : at]:
            assert known


def test_digests_survive_a_change_of_generations() -> None:
    marks = BloomFilter(64)
    for i in range(100):
        marks.add(digest(i))
    assert all(marks.add(digest(i)) for i in range(36, 100))


def test_a_filter_has_few_false_positives_a_fixed_size_and_forgets() -> None:
    marks = BloomFilter(1000)
    assert sum(marks.add(digest(i)) for i in range(20_000)) < 200
    assert len(marks._new) == len(marks._old) == 2000
    assert sum(marks.add(digest(i)) for i in range(1000)) < 20  # long gone
    assert sum(marks.add(digest(i)) for i in range(1000)) == 1000


def test_a_filter_works_with_digests_that_are_counters() -> None:
    marks = BloomFilter(1000)
    assert sum(marks.add(i.to_bytes(32, "little")) for i in range(900)) < 20
    assert 300 < sum(sampled(i.to_bytes(32, "little"), 32768) for i in range(900)) < 600


def test_groups_are_counted_separately() -> None:
    rule = SecondHit(full, {0: 100})
    assert not rule(0, name(1, group=0))
    assert not rule(0, name(1, group=1)), "the second group's object has not been ready before either"
    assert rule(0, name(1, group=0))
    assert rule(0, name(1, group=1))


def test_a_tier_without_capacity_limit_gets_everything() -> None:
    for rule in (SecondHit(full, {0: 100}), Adaptive(full, {0: 100})):
        assert rule(1, name(1))
        assert rule(1, name(2))


@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True), max_size=120))
def test_ghost_caches_hold_no_more_than_their_tier_and_the_rule_is_deterministic(prompts: list[list[int]]) -> None:
    answers = []
    for _ in range(2):
        rule = Adaptive(full, {0: 20})
        admitted = []
        for prompt in prompts:
            rule.asked([digest(i) for i in prompt], 0, 0)
            admitted += [rule(0, name(i)) for i in prompt]
        trial = rule._trials[0]
        assert len(trial._everything) <= 20
        assert len(trial._some) <= 20
        answers.append(admitted)
    assert answers[0] == answers[1]


def test_a_large_tier_is_simulated_by_a_sample() -> None:
    rule = Adaptive(full, {0: 1_000_000}, sample=1024)
    for i in range(0, 200_000, 20):
        digests = [digest(j) for j in range(i, i + 20)]
        rule.asked(digests, 0, 0)
        for j in range(i, i + 20):
            rule(0, Name(b"n" * 32, digests[j - i], 0, 256, 0))
    assert 100 < len(rule._trials[0]._everything) < 400  # 1024 of a million, of 200 thousand


# ------------------------------------------------------------ adaptive


def serve(rule: Adaptive, prompts: list[list[int]], capacity: int) -> tuple[int, int]:
    """Simulates a tier that everything is written to that `rule` admits; returns (chunks found, chunks written)."""
    disk = GhostCache(capacity)
    hits = writes = 0
    for prompt in prompts:
        digests = [digest(i) for i in prompt]
        found = disk.request(digests)
        rule.asked(digests, 0, found)
        hits += found
        for i in prompt[found:]:
            if digest(i) not in disk._names and rule(0, name(i)):
                disk.ready(digest(i))
                writes += 1
    return hits, writes


class Everything(Adaptive):
    """Write-through."""

    def __call__(self, tier: int, name: Name) -> bool:
        return True


def few_among_many(rng: random.Random) -> list[list[int]]:
    """Twenty prompts that are repeated, among thousands that are not."""
    popular = [[k * 4 + j for j in range(4)] for k in range(20)]
    return [rng.choice(popular) if i % 4 == 0 else [1000 + 4 * i + k for k in range(4)] for i in range(4000)]


def back_once(rng: random.Random) -> list[list[int]]:
    """Every prompt is repeated once, some requests later: what is not written at once is never found."""
    order = [(i + rng.choice((0.0, rng.uniform(20, 40))), i) for i in range(1500) for _ in range(2)]
    return [[1000 + 4 * i + k for k in range(4)] for _, i in sorted(order)]


@pytest.mark.parametrize("pattern", [few_among_many, back_once])
def test_it_follows_the_rule_with_more_hits(pattern: Callable[[random.Random], list[list[int]]]) -> None:
    prompts = pattern(random.Random(3))
    capacity = 200
    hits, writes = serve(Adaptive(full, {0: capacity}), prompts, capacity)
    through, all_writes = serve(Everything(full, {0: capacity}), prompts, capacity)
    assert hits >= 0.98 * through
    if pattern is few_among_many:
        assert writes <= 0.3 * all_writes
        assert hits > 1.2 * through
    else:
        assert through > 1000


def test_where_nothing_is_repeated_almost_nothing_is_written() -> None:
    prompts = [[4 * i + k for k in range(4)] for i in range(2000)]
    hits, writes = serve(Adaptive(full, {0: 200}), prompts, 200)
    assert hits == 0
    assert 299 <= writes <= 340, "the warm-up, and a few false positives"


def test_a_request_that_is_looked_up_twice_counts_once() -> None:
    rule = Adaptive(full, {0: 10})
    for _ in range(2):
        rule.asked([digest(1)], 0, 1)  # it is on the tier: the engine looks it up, and then loads it
    assert rule._trials[0]._verdict._all == 0


def test_a_verdict_ends_quickly_however_old_it_is() -> None:
    verdict = Verdict()
    for _ in range(500):
        verdict.see(0, 10)
    assert verdict.choosy
    needed = 0
    while verdict.choosy:
        verdict.see(10, 0)
        needed += 1
    assert needed < 30


# ------------------------------------------------------------ break-even


def break_even() -> BreakEven:
    """A chunk of 1000 bytes that takes 1 ms to compute."""
    rule = BreakEven(lambda group: 1000)
    for _ in range(rule.FEW):
        rule.computed(256, 0.001)
    return rule


def test_nothing_is_written_that_is_faster_to_recompute_than_to_load() -> None:
    rule = break_even()
    assert rule(0, name(1)), "nothing was measured yet"
    for _ in range(rule.FEW):
        rule.loaded(0, 1000, 0.002)
    assert not rule(0, name(1))
    assert rule(1, name(1)), "nothing was measured for this tier"
    for _ in range(rule.LAST):
        rule.loaded(0, 1000, 0.0001)
    assert rule(0, name(1))


def test_what_is_tried_begins_at_a_prompts_start_even_if_all_prompts_share_a_prefix() -> None:
    rule = break_even()
    for _ in range(rule.FEW):
        rule.loaded(0, 1000, 0.002)
    tried: list[tuple[int, int]] = []
    for prompt in range(40):  # all with the same first chunk, which is present, and 64 new ones
        tried += [(prompt, depth) for depth in range(1, 65) if rule(0, name(100 * prompt + depth, depth=depth))]
    assert tried == [(prompt, depth) for prompt in (16, 33) for depth in range(1, 33)]


def test_one_slow_read_changes_nothing_and_break_even_has_hysteresis() -> None:
    rule = break_even()
    rule.loaded(0, 1000, 60.0)
    assert rule(0, name(1))
    for _ in range(rule.LAST):
        rule.loaded(0, 1000, 0.0011)
    assert rule(0, name(1)), "slightly slower: nothing changes"
    for _ in range(rule.LAST):
        rule.loaded(0, 1000, 0.0013)
    assert not rule(0, name(1))
    for _ in range(rule.LAST):
        rule.loaded(0, 1000, 0.0011)
    assert not rule(0, name(1)), "slightly faster: nothing changes"


def test_of_what_is_rejected_a_prompts_start_is_tried_now_and_then() -> None:
    rule = break_even()
    for _ in range(rule.FEW):
        rule.loaded(0, 1000, 0.002)
    decisions = [rule(0, name(i, depth=i % 10)) for i in range(20_000)]
    tried = [i for i, admitted in enumerate(decisions) if admitted]
    assert 0.02 < len(tried) / len(decisions) < 0.05
    assert all(i % 10 == 0 for i in tried if not decisions[i - 1])


# ------------------------------------------------------------ as configured


def hybrid() -> KVSpec:
    planes = (Plane("k", "bfloat16", 64), Plane("v", "bfloat16", 64))
    groups = [LayerGroup("sliding", (0, 1, 2), planes, 2, trailing(64)), LayerGroup("full", (3,), planes, 2, ALL)]
    return KVSpec.of_groups("m", groups)


def test_what_is_remembered_is_bounded_however_many_objects_a_tier_holds() -> None:
    planes = (Plane("k", "bfloat16", 8),)
    tiny = KVSpec.of_groups("m", [LayerGroup("full", (0,), planes, 1)])
    admission = Admission(Config(admission="adaptive", chunk_tokens=1), [tiny], 1, [1 << 40])  # 250 million objects
    admission.measured(0, [TierFacts(1 << 40, 0, 0.0)])
    admission.asked([digest(1)], 0, 0)
    admission(0, name(1))
    rule = admission._rule
    assert isinstance(rule, Adaptive)
    assert len(rule._second._seen[0]._new) <= 4 << 20
    seen = rule._trials[0]._some._seen
    assert seen is not None
    assert seen._bits <= 8 * (4 << 20)


def test_free_space_is_what_the_tier_reports_less_what_was_admitted_since() -> None:
    spec = hybrid()
    size = sum(spec.object_bytes(group, 256) + 4096 for group in (0, 1))
    admission = Admission(Config(admission="second"), [spec], 256, [18 * size, None])
    assert admission.bounded == [0]
    admission.measured(0, [TierFacts(17 * size, 0, 0.0), TierFacts(0, 0, 0.0)])
    assert admission.has_room(0)
    assert admission(0, name(1, group=0))  # the larger group's
    assert not admission.has_room(0), "the tier would evict"
    assert admission.has_room(1)
    assert not admission(0, name(2))
    assert admission(1, name(2))
    admission.measured(0, [TierFacts(10 * size, 0, 0.0), TierFacts(0, 0, 0.0)])
    assert admission(0, name(3))


def test_the_parts_of_all_ranks_count_where_they_share_a_folder() -> None:
    whole = KVSpec.uniform("m", layers=4, kv_heads=4, head_dim=64, dtype="bfloat16")
    parts = [whole.shard(tp_rank=rank, tp_size=4) for rank in range(4)]
    capacity = 100 << 20
    config = Config(admission="adaptive")
    sizes = {Admission(config, specs, 256, [capacity])._sizes[0] for specs in ([whole], parts, parts[2:3])}
    assert sizes == {whole.object_bytes(0, 256) + 4096}


def test_a_tiers_speed_is_measured_in_portions_of_several_objects() -> None:
    spec = KVSpec.uniform("m", layers=4, kv_heads=4, head_dim=64, dtype="bfloat16")
    chunk = spec.object_bytes(0, 256)
    config = Config(admission="all", prefill_tokens_per_s=256_000.0)
    assert config.selective
    admission = Admission(config, [spec], 256, [None])
    loaded, busy = 0, 0.0
    for i in range(400):  # ten times as slow as computing
        loaded, busy = loaded + chunk, busy + 0.01
        admission.measured(0, [TierFacts(0, loaded, busy)])
        assert i >= 39 or admission(0, name(1)), "five portions of eight objects each"
    assert not admission(0, name(1))
    admission.measured(0, [TierFacts(0, 0, 0.0)])  # an old message
    assert not admission(0, name(2))


def test_where_everything_is_written_admission_is_inactive() -> None:
    assert not Admission(Config(admission="all"), [hybrid()], 256, [1 << 30]).active
    assert not Config(admission="all").selective


def test_invalid_settings_are_rejected_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"admission: 'adaptve' is not one of .*; did you mean 'adaptive'\?"):
        Config(admission="adaptve")  # type: ignore[arg-type]
    for wrong in (0, -1.0, "fast", True, float("inf")):
        with pytest.raises(ConfigError, match=r"prefill_tokens_per_s: .* is not a number per second above 0"):
            Config(prefill_tokens_per_s=wrong)  # type: ignore[arg-type]
    assert Config.load(environ={"LMCACHE_PREFILL_TOKENS_PER_S": "8e3"}).prefill_tokens_per_s == 8000.0


def test_loads_at_the_same_time_share_that_time() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    with meter.load() as one:
        now[0] = 1.0
        with meter.load() as two:
            now[0] = 2.0
            two(100)
        now[0] = 3.0
        assert meter.read() == (100, 3.0)
        now[0] = 4.0
        one(100)
    now[0] = 50.0
    assert meter.read() == (200, 4.0)

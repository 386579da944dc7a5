"""The contract of the control plane, whatever its ranks and the network between them do.

    class TestMyIndex(IndexTests):
        def open_index(self, groups, slots, **settings):
            return MyIndex(groups, CHUNK, slots, **settings)

It runs against fake ranks (`indexlab.Rank`) that copy *names* instead of bytes and detect wrong ones: a slot that holds
another object than the plan says, or that is assigned again while a rank may still access it. Random histories are in
`index_machine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache.control import TierInfo
from lmcache.plan import Copy, Engine, Status
from lmcache.spec import ALL, HitRule, trailing
from lmcache_conformance.contract import Level
from lmcache_conformance.labs.index_cluster import Cluster
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at
from lmcache_conformance.runner.marks import level
from lmcache_conformance.suites.index_factory import IndexFactory

FULL = [("full", ALL)]
LEASE_S, LOAD_S = 20.0, 5.0


class IndexTests(IndexFactory):
    """The contract of `lmcache.control.Index`."""

    def cluster(
        self,
        slots: int = 4,
        *,
        ranks: int = 1,
        groups: Sequence[tuple[str, HitRule]] = FULL,
        tiers: Sequence[TierInfo] = (),
    ) -> Cluster:
        """Opens an empty index with its ranks."""
        settings = {"lease_ttl": LEASE_S, "load_deadline": LOAD_S}
        index = self.open_index(groups, [slots] * len(groups), ranks=ranks, tiers=tiers, **settings)
        return Cluster(index, ranks=ranks, tiers=len(tiers))

    # ---------------------------------------------------------------- bytes

    @level(Level.BYTES)
    def test_what_was_stored_is_offered_and_every_rank_loads_it_to_its_place(self) -> None:
        cluster = self.cluster(ranks=2)
        about = chain("one", "abcd")
        assert cluster.store(about).accepted == 4 * CHUNK
        cluster.settle()
        assert cluster.offered(about) == 4 * CHUNK
        job = cluster.load()
        assert job is not None
        cluster.settle()
        end = cluster.outcome(job)
        assert (end.kind, end.owner, end.ok_tokens, end.final) == ("load", "reader", 4 * CHUNK, True)
        for rank in cluster.ranks:
            for i in range(4):
                content = rank.engine[job][0, i * CHUNK]
                assert content[:2] == (name_at(about, 0, i), rank.rank), f"rank {rank.rank}, chunk {i}: {content}"
        cluster.quiet()

    @level(Level.BYTES)
    def test_a_hit_is_a_prefix_and_ends_at_the_first_difference(self) -> None:
        cluster = self.cluster(slots=8)
        cluster.store(chain("one", "abcd"))
        cluster.settle()
        assert cluster.offered(chain("one", "abxd")) == 2 * CHUNK
        assert cluster.offered(chain("one", "xbcd")) == 0, "a suffix is no hit"
        assert cluster.offered(chain("one", "abcd"), tokens=3 * CHUNK + 1) == 3 * CHUNK
        other = chain("two", "abcd")
        assert other.digests == chain("one", "abcd").digests, "as with an engine's own keys, which may lack the salt"
        assert cluster.offered(other) == 0, "another namespace"

    @level(Level.BYTES)
    def test_what_is_not_in_engine_memory_is_never_stored(self) -> None:
        """The block of a chunk outside of the sliding window, or of a placeholder, holds another request's bytes."""
        cluster = self.cluster(slots=8)
        about = chain("one", "abcd")
        cluster.store(about, resident=[[True, True, False, True]])
        cluster.plan()
        ops = [op for run in cluster.ranks[0].runs.values() for op in run.job.ops]
        starts = [op.start for op in ops if isinstance(op, Copy) and isinstance(op.src, Engine)]
        assert 2 * CHUNK not in starts, "a chunk that is not resident is copied"
        cluster.settle()
        assert cluster.offered(about) == 2 * CHUNK

    # ---------------------------------------------------------------- several ranks

    @level(Level.CONCURRENCY)
    def test_nothing_is_offered_before_every_rank_has_stored_its_part(self) -> None:
        cluster = self.cluster(ranks=3)
        about = chain("one", "ab")
        assert cluster.lookup(about) == ("miss", 0, "absent")
        job = cluster.store(about).job
        assert cluster.lookup(about) == ("miss", 0, "writing"), "offered before anything was copied"
        cluster.plan()
        for count, rank in enumerate((2, 0, 1)):
            assert cluster.lookup(about) == ("miss", 0, "writing"), f"offered when {count} of 3 ranks had stored"
            cluster.execute(rank)
            cluster.report(rank)
        end = cluster.outcome(job)
        assert (end.kind, end.owner, end.ok_tokens, end.final) == ("store", "writer", 2 * CHUNK, True)
        assert cluster.lookup(about) == ("hit", 2 * CHUNK, "end")

    @level(Level.FAULTS)
    def test_what_one_rank_failed_to_store_is_offered_by_none(self) -> None:
        for culprit in range(3):
            for status in (Status.FAILED, Status.FULL, Status.SKIPPED, Status.LATE):
                cluster = self.cluster(ranks=3)
                about = chain("one", "abc")

                def fault(rank: int, op: Any, culprit: int = culprit, status: Status = status) -> Status | None:
                    return status if rank == culprit and op.name == name_at(about, 0, 1) else None  # noqa: B023

                cluster.store(about)
                cluster.settle(fault)
                found = cluster.lookup(about)
                assert found == ("hit", CHUNK, "failed"), (
                    f"rank {culprit} failed to store chunk 1 ({status.name}); a lookup gives {found}"
                )
                cluster.index.forget("reader")
                cluster.quiet()
                assert cluster.store(about).accepted > 0, "what failed may be stored again"
                cluster.settle()
                assert cluster.offered(about) == 3 * CHUNK

    @level(Level.FAULTS)
    def test_lost_reports_are_made_good_by_the_next(self) -> None:
        cluster = self.cluster(ranks=2)
        about = chain("one", "ab")
        cluster.store(about)
        cluster.plan()
        for rank in range(2):
            cluster.execute(rank)
            cluster.ranks[rank].report()  # lost
            assert cluster.offered(about) == 0
        cluster.plan()
        for rank in range(2):
            cluster.report(rank)
        assert cluster.offered(about) == 2 * CHUNK, "after a lost report the object never became visible"
        cluster.index.forget("reader")
        cluster.quiet()

    @level(Level.FAULTS)
    def test_a_report_that_comes_twice_or_late_frees_no_slot_under_a_reader(self) -> None:
        cluster = self.cluster(slots=2, ranks=2)
        first, second = chain("one", "ab"), chain("one", "xy")
        cluster.store(first)
        cluster.settle()
        cluster.offered(first)
        job = cluster.load()
        assert job is not None
        cluster.plan()
        cluster.execute(0)
        doubled = cluster.ranks[0].report()
        for _ in range(3):
            cluster.index.report(doubled, cluster.now)
        cluster.report(0)  # the same again, in a new report
        cluster.later(LEASE_S + 1)
        cluster.index.clear(None, cluster.now)
        assert cluster.store(second).accepted == 0, "slots that rank 1 still reads were given away"
        cluster.plan()
        cluster.execute(1)
        cluster.report(1)
        cluster.quiet()
        assert cluster.store(second).accepted == 2 * CHUNK, "the slots never came back"

    @level(Level.FAULTS)
    def test_slots_of_a_load_that_hangs_are_not_reused_until_it_ended(self) -> None:
        cluster = self.cluster(slots=2, tiers=[TierInfo("disk")])
        about = chain("one", "ab")
        cluster.store(about)
        cluster.settle()
        cluster.index.clear(None, cluster.now)
        cluster.settle()
        cluster.hold(about)
        assert cluster.offered(about) == 2 * CHUNK
        job = cluster.load()
        cluster.plan()
        cluster.execute(0, lambda rank, op: "hang")
        [run] = cluster.ranks[0].runs.values()
        cluster.ranks[0].expire(run)  # the rank's own deadline
        cluster.report(0)
        end = cluster.outcome(job)
        assert (end.ok_tokens, end.final) == (0, False), "a load that hangs is not a load"
        for text in ("pq", "rs", "tu"):
            cluster.store(chain("one", text))
            cluster.plan()  # the rank asserts that no slot is assigned again that its hung read may still fill
        cluster.execute(0)
        cluster.report(0)
        cluster.index.forget("reader")
        cluster.quiet()

    @level(Level.FAULTS)
    def test_reports_of_an_earlier_epoch_mean_nothing(self) -> None:
        cluster = self.cluster()
        about = chain("one", "ab")
        cluster.store(about)
        cluster.plan()
        cluster.execute(0)
        stale = cluster.ranks[0].report()
        cluster.ranks[0].die()
        cluster.index.reset(cluster.now)
        cluster.index.report(stale, cluster.now)
        assert cluster.offered(about) == 0, "what a dead rank had stored is offered"
        cluster.quiet()

    # ---------------------------------------------------------------- loads that fail

    @level(Level.FAULTS)
    def test_a_load_counts_only_what_arrived_on_every_rank(self) -> None:
        for culprit in range(2):
            for status in (Status.CORRUPT, Status.MISSING, Status.FAILED, Status.LATE, Status.CANCELLED):
                cluster = self.cluster(ranks=2)
                about = chain("one", "abcd")
                cluster.store(about)
                cluster.settle()
                assert cluster.offered(about) == 4 * CHUNK
                job = cluster.load()

                def fault(rank: int, op: Any, culprit: int = culprit, status: Status = status) -> Status | None:
                    if op.name == name_at(about, 0, 3):  # noqa: B023
                        return None if rank == culprit else Status.FAILED
                    return status if rank == culprit and op.name == name_at(about, 0, 2) else None  # noqa: B023

                cluster.settle(fault)
                end = cluster.outcome(job)
                assert end.ok_tokens == 2 * CHUNK, (
                    f"rank {culprit} failed to load chunk 2 ({status.name}); {end.ok_tokens} tokens are reported as loaded"
                )
                assert end.statuses == (Status.OK, Status.OK, status, Status.FAILED)
                cluster.index.forget("reader")
                cluster.quiet()

    @level(Level.FAULTS)
    def test_a_rank_that_says_nothing_fails_the_load_in_bounded_time(self) -> None:
        cluster = self.cluster(ranks=2)
        about = chain("one", "ab")
        cluster.store(about)
        cluster.settle()
        cluster.offered(about)
        job = cluster.load()
        cluster.plan()
        cluster.execute(0)
        cluster.report(0)
        cluster.later(10 * LOAD_S)
        assert cluster.outcome(job).ok_tokens == 0
        assert not cluster.outcome(job).final, "the rank that has not reported may still be reading"

    @level(Level.FAULTS)
    def test_after_a_failed_load_that_request_is_offered_nothing_more(self) -> None:
        cluster = self.cluster(tiers=[TierInfo("disk")])
        about = chain("one", "ab")
        cluster.store(about)
        cluster.settle()
        assert cluster.offered(about, "unlucky") == 2 * CHUNK
        cluster.load("unlucky")
        assert cluster.offered(about, "unlucky") == 2 * CHUNK, "the load has not failed yet"
        cluster.settle(lambda rank, op: Status.CANCELLED if isinstance(op.dst, Engine) else None)
        assert not cluster.index.stats()["leases"], "what the request was offered during the load is still leased"
        for _ in range(3):
            found = cluster.lookup(about, "unlucky")
            assert found == ("miss", 0, "failed_before"), "a failed load is offered to the same request again"
            assert cluster.load("unlucky") is None
            cluster.index.release("unlucky")
        assert cluster.offered(about, "another") > 0, "other requests may load it"
        cluster.index.forget("another")
        cluster.index.forget("unlucky")
        assert cluster.offered(about, "unlucky") > 0, "a new request of that name may load it"
        cluster.index.forget("unlucky")
        cluster.quiet()

    @level(Level.FAULTS)
    def test_what_was_found_corrupt_is_not_offered_again_and_is_removed(self) -> None:
        cluster = self.cluster(slots=2, tiers=[TierInfo("disk")])
        about = chain("one", "ab")
        names = [name_at(about, 0, i) for i in range(2)]
        for name in names:
            cluster.ranks[0].tiers[0][name] = None
        cluster.index.announce(0, 0, names, True, cluster.now)
        assert cluster.offered(about) == 2 * CHUNK
        job = cluster.load()
        cluster.settle()
        assert cluster.outcome(job).ok_tokens == 0
        assert cluster.lookup(about, "another") == ("miss", 0, "corrupt")
        assert not cluster.ranks[0].tiers[0], "corrupt objects were not deleted"

    # ---------------------------------------------------------------- pressure

    @level(Level.PRESSURE)
    def test_a_full_arena_evicts_the_oldest_and_never_raises(self) -> None:
        cluster = self.cluster(slots=4)
        for number in range(20):
            about = chain("one", f"{chr(100 + number)}b")
            accepted = cluster.store(about).accepted
            assert accepted == 2 * CHUNK, (
                f"store {number} accepted {accepted} tokens, though old objects could be evicted"
            )
            cluster.settle()
            assert cluster.offered(about) == 2 * CHUNK
        cluster.index.forget("reader")
        cluster.quiet()

    @level(Level.PRESSURE)
    def test_what_is_leased_stays_and_what_does_not_fit_is_left_out(self) -> None:
        cluster = self.cluster(slots=2)
        first = chain("one", "ab")
        cluster.store(first)
        cluster.settle()
        assert cluster.offered(first) == 2 * CHUNK
        for text in ("xy", "uv"):
            cluster.store(chain("one", text))
            cluster.settle()
        job = cluster.load()
        assert job is not None, "leased objects were evicted"
        cluster.settle()
        assert cluster.outcome(job).ok_tokens == 2 * CHUNK

    @level(Level.PRESSURE)
    def test_thousands_of_requests_leave_no_pin_behind(self) -> None:
        """Leases that are released, replaced, loaded or expire: in the end every slot can be reused."""
        cluster = self.cluster(slots=2)
        about = chain("one", "ab")
        cluster.store(about)
        cluster.settle()
        for number in range(200):
            assert cluster.offered(about, number % 7) == 2 * CHUNK
            if number % 5 == 0:
                cluster.index.release(number % 7)
                cluster.index.release(number % 7)
            elif number % 5 == 1:
                cluster.load(number % 7)
                cluster.settle(rounds=2)
        cluster.later(LEASE_S + 1)
        cluster.settle()
        assert cluster.store(chain("one", "xy")).accepted == 2 * CHUNK, "pins leaked: nothing can be stored any more"
        cluster.settle()
        for owner in range(7):
            cluster.index.forget(owner)
        cluster.quiet()

    # ---------------------------------------------------------------- reset

    @level(Level.RESET)
    def test_after_clear_nothing_of_it_is_offered_from_any_place(self) -> None:
        cluster = self.cluster(slots=8, tiers=[TierInfo("disk")])
        one, two = chain("one", "ab"), chain("two", "ab")
        for about in (one, two):
            cluster.store(about)
        cluster.settle()
        assert cluster.offered(one, "early") == 2 * CHUNK
        assert cluster.index.clear(one.namespace, cluster.now) == 2
        assert cluster.load("early") is None, "a lease outlives the objects"
        cluster.ranks[0].tiers[0] = {n: c for n, c in cluster.ranks[0].tiers[0].items() if n.namespace != one.namespace}
        assert cluster.lookup(one) == ("miss", 0, "absent"), "cleared, and still offered"
        assert cluster.offered(two) == 2 * CHUNK, "another namespace was cleared, too"
        assert cluster.load() is not None
        cluster.settle()
        assert cluster.lookup(one) == ("miss", 0, "absent")
        assert cluster.index.clear(None, cluster.now) == 2
        assert cluster.lookup(two) == ("miss", 0, "absent")
        stats = cluster.index.stats()
        assert stats["slots_free"] == stats["slots"]

    @level(Level.RESET)
    def test_what_was_under_way_when_it_was_cleared_does_not_come_back(self) -> None:
        cluster = self.cluster(slots=8, tiers=[TierInfo("disk")])
        about = chain("one", "ab")
        cluster.store(about)
        cluster.plan()
        cluster.execute(0)
        cluster.index.clear(None, cluster.now)  # the store's report has not arrived yet
        cluster.report(0)
        assert cluster.lookup(about) == ("miss", 0, "absent"), "a store that was under way brought it back"
        assert not cluster.jobs("write_back"), "cleared objects are written to the tier"
        cluster.store(about)
        cluster.plan()
        cluster.execute(0)
        cluster.report(0)
        cluster.plan()  # now the write to the tier is under way
        cluster.index.clear(None, cluster.now)
        cluster.ranks[0].tiers[0].clear()
        cluster.execute(0)
        cluster.report(0)
        cluster.settle()
        assert cluster.offered(about) == 0, "a write-back that was under way brought it back"
        assert not cluster.ranks[0].tiers[0], "it is in the tier again, where the next process finds it"

    # ---------------------------------------------------------------- groups with other rules

    @level(Level.BYTES)
    def test_a_hit_has_what_every_groups_rule_needs(self) -> None:
        """Sliding windows, recurrent states: without their side state a prefix cannot be used."""
        cases: list[tuple[HitRule, list[bool], int]] = [
            (trailing(CHUNK), [False, False, True, True], 4),
            (trailing(CHUNK + 1), [False, False, True, True], 4),
            (trailing(CHUNK + 1), [False, False, False, True], 0),
            (trailing(2 * CHUNK + 1), [False, False, True, True], 0),
            (trailing(2 * CHUNK), [True, True, False, True], 2),
            (HitRule("state_at"), [False, True, False, False], 2),
            (HitRule("state_at"), [False, False, False, False], 0),
            (HitRule("whole"), [True, False, False, False], 4),
        ]
        for rule, held, chunks in cases:
            cluster = self.cluster(slots=8, groups=[("full", ALL), ("other", rule)])
            about = chain("one", "abcd")
            cluster.store(about, resident=[[True] * 4, held])
            cluster.settle()
            _, offered, stop = cluster.lookup(about)
            assert offered == chunks * CHUNK, (
                f"{rule}: of {held}, {offered // CHUNK} chunks are offered, {chunks} are right"
            )
            assert stop == ("end" if chunks == 4 else "group")
            if job := cluster.load():
                cluster.settle()
                assert cluster.outcome(job).ok_tokens == offered
                loaded = {start // CHUNK for group, start in cluster.ranks[0].engine[job] if group == 1}
                first = max(0, chunks - -(-rule.window // CHUNK)) if rule.kind == "trailing" else chunks - 1
                wanted = {0} if rule.kind == "whole" else set(range(first, chunks))
                assert wanted <= loaded, f"{rule}: side state of chunks {wanted - loaded} was not restored"
            cluster.index.forget("reader")
            cluster.quiet()

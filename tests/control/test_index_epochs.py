"""Reports that go astray, clearing, and starting anew after a rank died."""

from __future__ import annotations

from indexdriver import ABCD, DISK, OK, REDIS, Lab

from lmcache.control import Finished
from lmcache.plan import ArenaSlot, Copy, Delete, Job, JobReport, Plan, Report
from lmcache.spec import ALL, trailing
from lmcache_conformance.labs.indexlab import chain, name_at

# -------------------------------------------------------------------- reports


def test_reports_that_come_twice_late_or_from_elsewhere_change_nothing() -> None:
    lab = Lab(ranks=2)
    first, second = lab.store(chain("one", "a")), lab.store(chain("one", "b"))

    def report(epoch: int, rank: int, seq: int, *jobs: Job) -> list[Finished]:
        told = tuple(JobReport(job.id, (1,) * len(job.ops), True) for job in jobs)
        ended = lab.index.report(Report(epoch, rank, seq, told), 0.0)
        lab.index.check()
        return ended

    assert report(0, 0, 2, first, second) == []
    assert report(0, 0, 1, first) == []
    assert report(1, 1, 5, first) == []
    assert report(0, 7, 5, first) == []
    assert lab.plan().acked == (2, 0)
    assert [end.job for end in report(0, 1, 9, first, second)] == [first.id, second.id]
    assert report(0, 1, 9, first, second) == []
    assert lab.plan().acked == (2, 9)


def test_the_same_calls_give_the_same_plans() -> None:
    def run() -> list[Plan]:
        lab = Lab(slots=3, tiers=[DISK, REDIS], ranks=2, groups=[("full", ALL), ("sliding", trailing(5))])
        plans = []
        for text in ("abcd", "abxy", "q"):
            lab.index.begin_store(text, chain("one", text), first=0, last=len(text), now=0.0)
            plans.append(lab.plan())
            for job in plans[-1].jobs:
                for rank in range(2):
                    lab.answer(job, OK, rank=rank)
            lab.look(chain("one", text), owner=text)
            lab.index.begin_load(text, 0.0)
            plans.append(lab.plan())
        return plans

    assert run() == run()


# -------------------------------------------------------------------- clear and reset


def test_clear_takes_one_namespace_and_its_leases_from_everywhere_at_once() -> None:
    lab = Lab(tiers=[DISK])
    lab.have()
    lab.have(chain("two", "abcd"))
    lab.look()
    assert lab.index.clear(ABCD.namespace, 0.0) == 4
    assert lab.index.begin_load("me", 0.0) is None
    assert lab.look() == ("miss", 0, "absent")
    assert lab.look(chain("two", "abcd")) == ("hit", 16, "end")
    assert lab.index.clear(None, 0.0) == 4
    assert lab.look(chain("two", "abcd"))[0] == "miss"
    assert lab.index.stats()["slots_free"] == lab.index.stats()["slots"]


def test_clear_frees_slots_under_a_reader_only_when_it_ends() -> None:
    lab = Lab(slots=4)
    lab.have()
    lab.look()
    job = lab.load()
    lab.index.clear(None, 0.0)
    assert lab.index.stats()["slots_leaving"] == 4
    assert lab.index.begin_store("x", ABCD, first=0, last=4, now=0.0).skipped == {"full": 1, "parent": 3}
    assert lab.answer(job, OK)[0].ok_tokens == 16
    assert lab.index.stats()["slots_free"] == 4


def test_what_was_being_stored_when_its_namespace_was_cleared_never_appears() -> None:
    lab = Lab(tiers=[DISK])
    job = lab.store()
    lab.index.clear(ABCD.namespace, 0.0)
    lab.answer(job, OK)
    assert lab.look() == ("miss", 0, "absent")
    assert lab.jobs() == []


def test_what_reaches_a_tier_after_a_clear_is_deleted_again_and_what_has_not_left_is_withdrawn() -> None:
    lab = Lab(tiers=[DISK])
    lab.answer(lab.store(chain("one", "a")), OK)
    [spill] = lab.jobs("write_back")
    lab.index.begin_store("x", chain("one", "b"), first=0, last=1, now=0.0)
    [store] = lab.jobs("store")
    lab.answer(store, OK)  # its spill waits for the next plan
    lab.index.clear(ABCD.namespace, 0.0)
    lab.answer(spill, OK)
    assert lab.look(chain("one", "a"))[0] == "miss"
    [delete] = lab.jobs()
    assert delete.ops == (Delete(name_at(chain("one", "a"), 0, 0), 0),)
    lab.answer(delete, OK)
    assert lab.index.stats()["jobs"] == 0


def test_a_probe_from_before_a_clear_teaches_nothing() -> None:
    lab = Lab(tiers=[REDIS])
    lab.look()
    [probe] = lab.jobs()
    lab.index.clear(None, 0.0)
    lab.answer(probe, OK)
    assert lab.index.where(name_at(ABCD, 0, 0)) == ()


def test_a_reset_voids_jobs_frees_all_slots_and_remembers_the_tiers() -> None:
    lab = Lab(slots=4, tiers=[DISK])
    lab.have()
    lab.look()
    load = lab.load()
    ended = lab.index.reset(0.0)
    lab.index.check()
    assert [(end.job, end.ok_tokens, end.final) for end in ended] == [(load.id, 0, True)]
    assert lab.look() == ("miss", 0, "failed_before")
    assert lab.answer(load, OK) == []
    stats = lab.index.stats()
    assert (stats["slots_free"], stats["jobs"], stats["leases"], stats["epoch"]) == (4, 0, 0, 1)
    assert lab.look(owner="other") == ("hit", 16, "end")
    assert lab.index.lookup("other", ABCD, 16, 0.0).by_tier == {"disk": 16}
    plan = lab.plan()
    assert (plan.epoch, plan.acked) == (1, (0,))


def test_generations_go_on_after_a_reset() -> None:
    lab = Lab(slots=1)
    before = lab.store(chain("one", "a")).ops[0]
    lab.index.reset(0.0)
    after = lab.store(chain("one", "a")).ops[0]
    assert isinstance(before, Copy)
    assert isinstance(after, Copy)
    assert isinstance(before.dst, ArenaSlot)
    assert isinstance(after.dst, ArenaSlot)
    assert after.dst.generation > before.dst.generation


def test_deletions_that_a_reset_interrupts_are_planned_anew() -> None:
    lab = Lab(tiers=[DISK])
    lab.answer(lab.store(chain("one", "a")), OK)
    lab.jobs("write_back")
    lab.index.clear(None, 0.0)
    lab.index.reset(0.0)
    [delete] = lab.jobs()
    assert delete.ops == (Delete(name_at(ABCD, 0, 0), 0),)
    lab.index.reset(0.0)
    assert [job.ops for job in lab.jobs()] == [delete.ops]

"""The index: lost and repeated reports, clears, and resets after a rank has died."""

from __future__ import annotations

from lmcache.control import Finished
from lmcache.plan import ArenaSlot, Copy, Delete, Job, JobReport, Plan, Report
from lmcache.spec import ALL, trailing
from lmcache_conformance.labs.index_cluster import ABCD, DISK, OK, REDIS, open_cluster
from lmcache_conformance.labs.indexlab import chain, name_at

# -------------------------------------------------------------------- reports


def test_repeated_old_and_foreign_reports_change_nothing() -> None:
    cluster = open_cluster(ranks=2)
    first, second = cluster.store_job(chain("one", "a")), cluster.store_job(chain("one", "b"))

    def report(epoch: int, rank: int, seq: int, *jobs: Job) -> list[Finished]:
        statuses = tuple(JobReport(job.id, (1,) * len(job.ops), True) for job in jobs)
        ended = cluster.index.report(Report(epoch, rank, seq, statuses), 0.0)
        cluster.index.check()
        return ended

    assert report(0, 0, 2, first, second) == []
    assert report(0, 0, 1, first) == []
    assert report(1, 1, 5, first) == []
    assert report(0, 7, 5, first) == []
    assert cluster.plan().acked == (2, 0)
    assert [end.job for end in report(0, 1, 9, first, second)] == [first.id, second.id]
    assert report(0, 1, 9, first, second) == []
    assert cluster.plan().acked == (2, 9)


def test_the_same_calls_give_the_same_plans() -> None:
    def run() -> list[Plan]:
        cluster = open_cluster(slots=3, tiers=[DISK, REDIS], ranks=2, groups=[("full", ALL), ("sliding", trailing(5))])
        plans = []
        for text in ("abcd", "abxy", "q"):
            cluster.store(chain("one", text), text)
            plans.append(cluster.plan())
            for job in plans[-1].jobs:
                for rank in range(2):
                    cluster.complete(job, OK, rank=rank)
            cluster.lookup(chain("one", text), owner=text)
            cluster.index.begin_load(text, 0.0)
            plans.append(cluster.plan())
        return plans

    assert run() == run()


# -------------------------------------------------------------------- clear and reset


def test_clear_frees_slots_of_a_running_load_only_when_it_ends() -> None:
    cluster = open_cluster(slots=4)
    cluster.have()
    cluster.lookup()
    job = cluster.load_job()
    cluster.index.clear(None, 0.0)
    assert cluster.index.stats()["slots_leaving"] == 4
    assert cluster.store(ABCD, "x").skipped == {"full": 1, "parent": 3}
    assert cluster.complete(job, OK)[0].ok_tokens == 16
    assert cluster.index.stats()["slots_free"] == 4


def test_a_clear_cancels_write_backs_that_are_not_planned_yet_and_deletes_what_others_have_written() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.complete(cluster.store_job(chain("one", "a")), OK)
    [write_back] = cluster.jobs("write_back")
    cluster.complete(cluster.store_job(chain("one", "b")), OK)  # its write-back waits for the next plan
    cluster.index.clear(ABCD.namespace, 0.0)
    cluster.complete(write_back, OK)
    [delete] = cluster.jobs()
    assert delete.ops == (Delete(name_at(chain("one", "a"), 0, 0), 0),)
    cluster.complete(delete, OK)
    assert cluster.index.stats()["jobs"] == 0


def test_after_names_changed_nothing_is_in_dram_and_write_backs_finish_and_stay() -> None:
    cluster = open_cluster(slots=4, tiers=[DISK])
    cluster.complete(cluster.store_job(chain("one", "a")), OK)
    [write_back] = cluster.jobs("write_back")
    stored = cluster.store_job(chain("one", "b"))  # not reported yet
    cluster.complete(cluster.store_job(chain("two", "c")), OK)  # its write-back waits for the next plan
    assert cluster.index.drop_all() == 3
    cluster.complete(stored, OK)
    cluster.complete(write_back, OK)
    [planned] = cluster.jobs()
    assert planned.kind == "write_back", "deletes what is right under its name"
    cluster.complete(planned, OK)
    cluster.index.check()
    stats = cluster.index.stats()
    assert (stats["slots_free"], stats["jobs"]) == (4, 0)
    assert cluster.index.where(name_at(chain("one", "a"), 0, 0)) == ("disk",)
    assert cluster.index.where(name_at(chain("one", "b"), 0, 0)) == (), "a store that was under way came back"


def test_a_clear_discards_the_result_of_a_running_probe() -> None:
    cluster = open_cluster(tiers=[REDIS])
    cluster.hold(announce=False)
    cluster.lookup()
    [probe] = cluster.jobs()
    cluster.index.clear(None, 0.0)
    cluster.complete(probe, OK)
    assert cluster.index.where(name_at(ABCD, 0, 0)) == ()


def test_a_reset_ends_jobs_frees_all_slots_and_keeps_the_directories_of_tiers() -> None:
    cluster = open_cluster(slots=4, tiers=[DISK])
    cluster.have()
    cluster.lookup()
    load = cluster.load_job()
    ended = cluster.index.reset(0.0)
    cluster.index.check()
    assert [(end.job, end.ok_tokens, end.final) for end in ended] == [(load.id, 0, True)]
    assert cluster.lookup() == ("miss", 0, "failed_before")
    assert cluster.complete(load, OK) == []
    stats = cluster.index.stats()
    assert (stats["slots_free"], stats["jobs"], stats["leases"], stats["epoch"]) == (4, 0, 0, 1)
    assert cluster.lookup(owner="other") == ("hit", 16, "end")
    assert cluster.index.lookup("other", ABCD, 16, 0.0).by_tier == {"disk": 16}
    plan = cluster.plan()
    assert (plan.epoch, plan.acked) == (1, (0,))


def test_generations_keep_growing_after_a_reset() -> None:
    cluster = open_cluster(slots=1)
    before = cluster.store_job(chain("one", "a")).ops[0]
    cluster.index.reset(0.0)
    after = cluster.store_job(chain("one", "a")).ops[0]
    assert isinstance(before, Copy)
    assert isinstance(after, Copy)
    assert isinstance(before.dst, ArenaSlot)
    assert isinstance(after.dst, ArenaSlot)
    assert after.dst.generation > before.dst.generation


def test_deletes_that_a_reset_interrupts_are_planned_again() -> None:
    cluster = open_cluster(tiers=[DISK])
    cluster.complete(cluster.store_job(chain("one", "a")), OK)
    cluster.jobs("write_back")
    cluster.index.clear(None, 0.0)
    cluster.index.reset(0.0)
    [delete] = cluster.jobs()
    assert delete.ops == (Delete(name_at(ABCD, 0, 0), 0),)
    cluster.index.reset(0.0)
    assert [job.ops for job in cluster.jobs()] == [delete.ops]

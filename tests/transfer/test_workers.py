"""Worker threads run tasks in order, start on demand, and do not keep a process alive."""

from __future__ import annotations

import subprocess
import sys
import threading

from lmcache.transfer.workers import Workers


def test_tasks_run_in_order_on_one_thread_and_all_run_before_close_returns() -> None:
    workers, seen = Workers("w", 1), []
    for i in range(100):
        assert workers.submit(lambda i=i: seen.append(i))
    assert workers.close()
    assert seen == list(range(100))
    assert not workers.submit(lambda: None)
    assert workers.close(), "closing twice is harmless"


def test_threads_start_only_if_all_others_are_busy() -> None:
    def threads() -> int:
        return sum(thread.name.startswith("demand-") for thread in threading.enumerate())

    workers = Workers("demand", 8)
    assert threads() == 0
    gate = threading.Event()
    for _ in range(3):
        workers.submit(gate.wait)
    assert threads() == 3
    gate.set()
    assert workers.close()
    assert threads() == 0


def test_without_a_thread_a_task_is_refused_and_with_one_it_waits(monkeypatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers, seen, gate = Workers("few", 2), [], threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert not workers.submit(lambda: seen.append("refused"))
    assert workers.submit(gate.wait)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert workers.submit(lambda: seen.append("waited"))
    gate.set()
    assert workers.close()
    assert seen == ["waited"]


def test_a_hanging_task_does_not_keep_close_or_the_process_waiting() -> None:
    code = (
        "import threading; from lmcache.transfer.workers import Workers\n"
        "w = Workers('w', 2); w.submit(threading.Event().wait)\n"
        "assert not w.close(0.05); print('ended')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "ended"

"""What a tier keeps when its process is killed, or the power fails, right after a flush."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from lmcache.plan import Status
from lmcache.tiers.base import Tier
from lmcache_conformance.contract import Level
from lmcache_conformance.labs import power_cut
from lmcache_conformance.labs.fresh_interpreter import command_for
from lmcache_conformance.labs.scratch import scratch_folder
from lmcache_conformance.labs.tier_objects import get, object_id, pattern, put
from lmcache_conformance.runner.marks import level, requires
from lmcache_conformance.suites.tier_factory import TierFactory

SIZE = 5000


class TierDurabilityTests(TierFactory):
    """Kill −9 and power loss. Each method that ends a process runs in one of its own."""

    @level(Level.FAULTS)
    @requires("persistent")
    def test_what_was_flushed_survives_kill9_and_the_rest_is_whole_or_missing(self, place: Path) -> None:
        command, environment = command_for(self, "flush_and_die", [str(place)])
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
        assert done.returncode == -signal.SIGKILL, f"the process ended by itself:\n{done.stderr[-3000:]}"
        tier = self.open_tier(place, None)
        try:
            self._holds(tier, range(20), "killed right after flush()")
            for found in tier.scan():
                result, data = get(tier, found.id, SIZE + 1)
                assert result.status is Status.MISSING or data == pattern(found.id.depth, SIZE), (
                    f"kill −9 left a part of object {found.id.depth}"
                )
        finally:
            tier.close()

    def flush_and_die(self, place: str) -> None:
        """Writes objects, flushes, and is killed while it writes more."""
        tier = self.open_tier(Path(place), None)
        self._fill(tier, range(20))

        def write_on() -> None:
            self._fill(tier, range(20, 10_000))

        tier.flush()
        threading.Thread(target=write_on, daemon=True).start()
        os.kill(os.getpid(), signal.SIGKILL)

    @level(Level.FAULTS)
    @requires("persistent", "durable")
    def test_what_a_durable_flush_covers_survives_a_power_loss(self, place: Path) -> None:
        """What is left of the folder is what was synced: see `labs.power_cut`."""
        if reason := power_cut.why_not():
            pytest.skip(reason)
        covered = {
            "a durable flush": range(5),
            "a second one": range(10),
            "one that was called while another one was under way": range(15),
        }
        if self.capabilities.shared:
            covered["one after another opener had written the same objects"] = range(20)
        with scratch_folder("lmcache-power-") as copies:
            command, environment = command_for(self, "flush_and_cut", [str(place)])
            done = subprocess.run(
                [sys.executable, power_cut.__file__, str(place), str(copies), *command],
                capture_output=True,
                text=True,
                env=environment,
                timeout=180,
                check=False,
            )
            assert done.returncode == 0, f"the process failed: {done.returncode}\n{done.stderr[-3000:]}"
            for number, (what, numbers) in enumerate(covered.items()):
                tier = self.open_tier(copies / str(number), None)
                try:
                    self._holds(tier, numbers, f"the power failed right after {what}")
                finally:
                    tier.close()

    def flush_and_cut(self, place: str) -> None:
        """Writes and flushes; copies of what is durable are taken each time a flush has returned."""
        power_cut.watched()
        tier = self.open_tier(Path(place), None)
        for numbers in (range(5), range(5, 10)):
            self._fill(tier, numbers)
            tier.flush(durable=True)
            power_cut.cut()
        self._fill(tier, range(10, 15))
        power_cut.hold()
        first = threading.Thread(target=tier.flush, kwargs={"durable": True})
        first.start()
        time.sleep(power_cut.HOLD_S / 5)  # by now the first is under way
        tier.flush(durable=True)
        power_cut.cut()
        first.join()
        if self.capabilities.shared:
            other = self.open_tier(Path(place), None)
            self._fill(other, range(15, 20))
            self._fill(tier, range(15, 20))
            tier.flush(durable=True)
            power_cut.cut()

    def _fill(self, tier: Tier, numbers: Iterable[int]) -> None:
        for number in numbers:
            put(tier, object_id(number), pattern(number, SIZE))

    def _holds(self, tier: Tier, numbers: Iterable[int], when: str) -> None:
        for number in numbers:
            result, data = get(tier, object_id(number), SIZE + 1)
            assert result.status is Status.OK, f"{when}: object {number} is {result.status.name}"
            assert data == pattern(number, SIZE), f"{when}: object {number} is damaged"

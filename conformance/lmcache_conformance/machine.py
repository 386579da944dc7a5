"""Random histories against a dictionary: `TierMachine` for any tier, by a factory. (`cachemachine` does it for whole caches.)"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Range, Read, Tier
from lmcache_conformance.tierlab import NAMESPACE, OTHER_NAMESPACE, object_id, pattern, put


def run_machine(machine: Callable[[], RuleBasedStateMachine], *, examples: int, steps: int) -> None:
    """Run a state machine made by a factory, as a test. Prints the failing history, shrunk."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[arg-type]  # it only calls it


_IDS = st.builds(
    object_id,
    st.integers(0, 3),
    namespace=st.sampled_from([NAMESPACE, OTHER_NAMESPACE]),
    group=st.integers(0, 1),
    tokens=st.sampled_from([16, 160]),
)


class TierMachine(RuleBasedStateMachine):
    """A tier beside a dict.

    Args:
        open_tier: opens the tier, always at the same place.
        persistent: what was written survives closing and opening again.
    """

    def __init__(self, open_tier: Callable[[], Tier], *, persistent: bool) -> None:
        super().__init__()
        self.open_tier = open_tier
        self.persistent = persistent
        self.model: dict[ObjectId, bytes] = {}

    @initialize()
    def open(self) -> None:
        self.tier = self.open_tier()

    @rule(id=_IDS, size=st.sampled_from([1, 100, 4096, 70_000]), seed=st.integers(0, 9))
    def write(self, id: ObjectId, size: int, seed: int) -> None:
        data = pattern(seed, size)
        expected = 0 if id in self.model else size
        assert put(self.tier, id, data) == (Status.OK, expected, "")
        self.model.setdefault(id, data)

    @rule(id=_IDS, offset=st.integers(0, 5000), length=st.integers(0, 5000))
    def read(self, id: ObjectId, offset: int, length: int) -> None:
        buffer = bytearray(b"?" * length)
        [result] = self.tier.read_into([Read(id, [memoryview(buffer)], [Range(offset, length)])])
        if id not in self.model:
            assert result.status is Status.MISSING
            return
        expected = self.model[id][offset : offset + length]
        assert result == (Status.OK, len(expected), "")
        assert bytes(buffer) == expected + b"?" * (length - len(expected))

    @rule(ids=st.lists(_IDS, max_size=3))
    def delete(self, ids: list[ObjectId]) -> None:
        assert all(result.status is Status.OK for result in self.tier.delete(ids))
        for id in ids:
            self.model.pop(id, None)

    @rule(namespace=st.sampled_from([None, NAMESPACE, OTHER_NAMESPACE]))
    def clear(self, namespace: bytes | None) -> None:
        doomed = [id for id in self.model if namespace in (None, id.namespace)]
        assert self.tier.clear(namespace) == len(doomed)
        for id in doomed:
            del self.model[id]

    @rule(durable=st.booleans())
    def flush(self, durable: bool) -> None:
        self.tier.flush(durable=durable)

    @rule()
    def reopen(self) -> None:
        if self.persistent:
            self.tier.close()
            self.tier = self.open_tier()

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "tier"):
            return
        assert {found.id: found.nbytes for found in self.tier.scan()} == {i: len(d) for i, d in self.model.items()}
        assert self.tier.used_bytes() == sum(map(len, self.model.values()))
        present = self.tier.contains(list(self.model))
        assert all(result.status is Status.OK for result in present)

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()

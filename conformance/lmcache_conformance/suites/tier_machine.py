"""Random histories of any tier, compared with a dictionary. Those of whole caches are in `cache_machine`."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Range, Read, Tier
from lmcache_conformance.labs.tier_objects import NAMESPACE, OTHER_NAMESPACE, get, object_id, pattern, put


def run_machine(
    machine: Callable[[], RuleBasedStateMachine], *, examples: int, steps: int, shrink: bool = True
) -> None:
    """Runs a state machine as a test. Prints the failing history.

    Args:
        machine: makes the state machine.
        examples: number of histories.
        steps: maximum number of steps per history.
        shrink: shorten the failing history.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[arg-type]  # a factory works as well as a class


_IDS = st.builds(
    object_id,
    st.integers(0, 3),
    namespace=st.sampled_from([NAMESPACE, OTHER_NAMESPACE]),
    group=st.integers(0, 1),
    tokens=st.sampled_from([16, 160]),
)


_OPENERS = st.integers(0, 1)
TRIES = 20
"""How often an object that was written may be evicted before it is read. Other objects may be as new, as far as a tier knows."""


class TierMachine(RuleBasedStateMachine):
    """A tier compared with a dict.

    Args:
        open_tier: opens the tier, always at the same place.
        persistent: objects survive closing and reopening.
        openers: number of simultaneous openers of the place; more than one only for a shared tier.
    """

    def __init__(self, open_tier: Callable[[], Tier], *, persistent: bool, openers: int = 1) -> None:
        super().__init__()
        self.open_tier = open_tier
        self.persistent = persistent
        self.openers = openers
        self.tiers: list[Tier] = []
        self.model: dict[ObjectId, bytes] = {}

    @initialize()
    def open(self) -> None:
        self.tiers = [self.open_tier() for _ in range(self.openers)]

    def tier(self, opener: int) -> Tier:
        """Returns one of the openers."""
        return self.tiers[opener % self.openers]

    @rule(at=_OPENERS, id=_IDS, size=st.sampled_from([1, 100, 4096, 70_000]), seed=st.integers(0, 9))
    def write(self, at: int, id: ObjectId, size: int, seed: int) -> None:
        data = pattern(seed, size)
        expected = 0 if id in self.model else size
        assert put(self.tier(at), id, data) == (Status.OK, expected, "")
        self.model.setdefault(id, data)

    @rule(at=_OPENERS, id=_IDS, offset=st.integers(0, 5000), length=st.integers(0, 5000))
    def read(self, at: int, id: ObjectId, offset: int, length: int) -> None:
        buffer = bytearray(b"?" * length)
        [result] = self.tier(at).read_into([Read(id, [memoryview(buffer)], [Range(offset, length)])])
        if id not in self.model:
            assert result.status is Status.MISSING
            return
        expected = self.model[id][offset : offset + length]
        assert result == (Status.OK, len(expected), "")
        assert bytes(buffer) == expected + b"?" * (length - len(expected))

    @rule(at=_OPENERS, ids=st.lists(_IDS, max_size=3))
    def delete(self, at: int, ids: list[ObjectId]) -> None:
        assert all(result.status is Status.OK for result in self.tier(at).delete(ids))
        for id in ids:
            self.model.pop(id, None)

    @rule(at=_OPENERS, namespace=st.sampled_from([None, NAMESPACE, OTHER_NAMESPACE]))
    def clear(self, at: int, namespace: bytes | None) -> None:
        doomed = [id for id in self.model if namespace in (None, id.namespace)]
        assert self.tier(at).clear(namespace) == len(doomed)
        for id in doomed:
            del self.model[id]

    @rule(at=_OPENERS, durable=st.booleans())
    def flush(self, at: int, durable: bool) -> None:
        self.tier(at).flush(durable=durable)

    @rule(at=_OPENERS)
    def reopen(self, at: int) -> None:
        if self.persistent:
            self.tier(at).close()
            self.tiers[at % self.openers] = self.open_tier()

    @invariant()
    def same_as_the_model(self) -> None:
        for tier in self.tiers:
            assert {found.id: found.nbytes for found in tier.scan()} == {i: len(d) for i, d in self.model.items()}
            assert tier.used_bytes() == sum(map(len, self.model.values()))
            present = tier.contains(list(self.model))
            assert all(result.status is Status.OK for result in present)

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()


class BoundedTierMachine(RuleBasedStateMachine):
    """A tier that may evict any object to stay below its capacity: objects it still serves must be correct.

    Args:
        open_tier: opens the tier with that capacity, always at the same place.
        capacity: in bytes.
        persistent: the tier may be closed and reopened.
    """

    def __init__(self, open_tier: Callable[[], Tier], *, capacity: int, persistent: bool) -> None:
        super().__init__()
        self.open_tier = open_tier
        self.capacity = capacity
        self.persistent = persistent
        self.tier: Tier | None = None
        self.model: dict[ObjectId, bytes] = {}  # what may be served; any of it may have been evicted

    @initialize()
    def open(self) -> None:
        self.tier = self.open_tier()

    @rule(id=_IDS, share=st.sampled_from([1, 5, 20, 45, 101]), seed=st.integers(0, 9))
    def write(self, id: ObjectId, share: int, seed: int) -> None:
        assert self.tier is not None
        data = pattern(seed, self.capacity * share // 100)
        before = get(self.tier, id, self.capacity)
        result = put(self.tier, id, data)
        assert result.status in (Status.OK, Status.FULL)
        if before[0].status is Status.OK and result.status is Status.OK and not result.nbytes:
            return  # the older object is kept
        assert result.status is Status.FULL or len(data) <= self.capacity
        if result.nbytes:
            self.model[id] = data
            for _ in range(TRIES):  # it may have been evicted in the background
                found, back = get(self.tier, id, self.capacity)
                if found.status is Status.OK:
                    break
                put(self.tier, id, data)
            assert back == data, f"{TRIES} writes were accepted, but the object is missing"

    @rule(id=_IDS)
    def read(self, id: ObjectId) -> None:
        assert self.tier is not None
        result, data = get(self.tier, id, self.capacity)
        assert result.status in (Status.OK, Status.MISSING)
        assert result.status is Status.MISSING or data == self.model.get(id), "the bytes served were never written"

    @rule(id=_IDS)
    def delete(self, id: ObjectId) -> None:
        assert self.tier is not None
        self.tier.delete([id])
        self.model.pop(id, None)

    @rule(namespace=st.sampled_from([None, NAMESPACE, OTHER_NAMESPACE]))
    def clear(self, namespace: bytes | None) -> None:
        assert self.tier is not None
        self.tier.clear(namespace)
        self.model = {id: data for id, data in self.model.items() if namespace not in (None, id.namespace)}

    @rule()
    def reopen(self) -> None:
        if self.persistent and self.tier is not None:
            self.tier.close()
            self.tier = self.open_tier()

    @invariant()
    def within_bounds_and_no_surprise(self) -> None:
        if self.tier is not None:
            found = {found.id: found.nbytes for found in self.tier.scan()}
            assert sum(found.values()) <= self.capacity, f"{sum(found.values())} bytes; {self.capacity} are allowed"
            assert found.items() <= {id: len(data) for id, data in self.model.items()}.items()

    def teardown(self) -> None:
        if self.tier is not None:
            self.tier.close()

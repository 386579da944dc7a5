"""Messages between scheduler and workers, plain data that vLLM encodes and sends inside its own messages.

`StepMeta` is part of a step's `SchedulerOutput`, `RankMeta` of a worker's output; `Handshake` is sent once at start-up or,
inside another connector, in the first `RankMeta`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache.control.outcomes import TierInfo
from lmcache.plan import Plan, Report, TierFacts
from lmcache.spec import KVSpec


class BlockView(msgspec.Struct, frozen=True, array_like=True):
    """Location of a request's tokens in vLLM's KV cache.

    Attributes:
        request: vLLM's request id.
        blocks: per group, block ids from the request's first token on; 0 is vLLM's null block (not resident).
        skip: number of leading tokens already resident in the engine; their slots are not written.
        tokens: length of the view, from the first token on.
    """

    request: str
    blocks: tuple[list[int], ...]
    skip: int
    tokens: int


@dataclass
class StepMeta(KVConnectorMetadata):
    """What the workers do in one step.

    Attributes:
        plan: for `Transfer`; loads and tier traffic run concurrently with the forward pass, stores after it.
        views: job id → engine memory of that job.
        refused: loads that vLLM waits for but that could not be planned; the worker reports them as failed.
        idle: the step has no forward pass.
        quiet: the step is idle and no request is left, so it may be the last one for a long time.
        opening: the scheduler has no offers yet; workers add theirs to their `RankMeta`.
    """

    plan: Plan
    views: dict[int, BlockView] = field(default_factory=dict)
    refused: list[BlockView] = field(default_factory=list)
    idle: bool = False
    quiet: bool = False
    opening: bool = False


class Offer(msgspec.Struct, frozen=True):
    """What a worker has opened.

    Attributes:
        rank: the worker's tensor-parallel rank.
        spec: spec of its KV; ranks must agree on all but the rects.
        slots: arena slots per group.
        tiers: nearest first.
        facts: measurements of each tier, if admission needs them.
        disabled: why this worker caches nothing, or empty.
    """

    rank: int
    spec: KVSpec | None
    slots: tuple[int, ...] = ()
    tiers: tuple[TierInfo, ...] = ()
    facts: tuple[TierFacts, ...] = ()
    disabled: str = ""


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """An `Offer`, encoded."""

    offer: bytes

    @staticmethod
    def of(offer: Offer) -> Handshake:
        """Encodes an offer."""
        return Handshake(msgspec.json.encode(offer))

    def read(self) -> Offer:
        """Decodes the offer."""
        return msgspec.json.decode(self.offer, type=Offer)


@dataclass
class RankMeta(KVConnectorWorkerMetadata):
    """The report of one rank or, after aggregation, of several.

    Attributes:
        reports: of each rank.
        facts: rank → measurements of each tier, if admission needs them.
        offers: of each rank, if the scheduler has none yet.
        cleared: namespaces (None: all) that other processes have removed from the tiers, by any rank.
    """

    reports: list[Report]
    facts: dict[int, list[TierFacts]] = field(default_factory=dict)
    offers: list[Handshake] = field(default_factory=list)
    cleared: list[bytes | None] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankMeta:
        """Concatenates both. Reports are cumulative and contain their rank, so nothing has to be merged."""
        assert isinstance(other, RankMeta)
        return RankMeta(
            [*self.reports, *other.reports],
            self.facts | other.facts,
            [*self.offers, *other.offers],
            [*self.cleared, *other.cleared],
        )


def agreed(offers: Sequence[Offer]) -> str:
    """Returns why these ranks cannot work together, or an empty string."""
    for offer in offers:
        if offer.disabled:
            return f"rank {offer.rank}: {offer.disabled}"
    first = offers[0]
    assert first.spec is not None
    for offer in offers[1:]:
        assert offer.spec is not None
        mine = (first.spec.model, first.spec.meaning, first.spec.groups, first.spec.numerics, _names(first))
        if (offer.spec.model, offer.spec.meaning, offer.spec.groups, offer.spec.numerics, _names(offer)) != mine:
            return f"ranks {first.rank} and {offer.rank} see different models, numerics or tiers"
    return ""


def _names(offer: Offer) -> list[tuple[str, bool]]:
    return [(tier.name, tier.shared) for tier in offer.tiers]

"""Admission to the tiers: the configured rule, and the tiers' used bytes and speed that it depends on.

The rules are in `lmcache.control.admission.rules`. Used bytes and speed are measured by the data plane (`TierFacts`); between
two measurements, admitted bytes are added to the used bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lmcache.config import Config
from lmcache.control.admission.rules import Adaptive, BreakEven, SecondHit
from lmcache.control.state import Admit
from lmcache.plan import Name, TierFacts
from lmcache.spec import KVSpec

_HEADER_BYTES = 4096
"""Least size of the header of an object's file: the payload is aligned to it."""

_SAMPLE_BYTES = 8 << 20
"""Loaded bytes that make up one measurement of a tier's speed."""


class Admission:
    """The rule for `Index(admit=…)` of one engine.

    Args:
        config: `admission`, `prefill_tokens_per_s`.
        specs: the spec of each rank of this engine. The objects of all ranks of the model, of this engine or others, are
            assumed to be in one folder.
        chunk_tokens: tokens per object.
        capacities: usable bytes of each tier, nearest first; None: no limit.
    """

    def __init__(
        self, config: Config, specs: Sequence[KVSpec], chunk_tokens: int, capacities: Sequence[int | None]
    ) -> None:
        self._bounds = {tier: size for tier, size in enumerate(capacities) if size is not None}
        whole = KVSpec.of_groups(specs[0].model, specs[0].groups)
        groups = range(len(whole.groups))
        self._sizes = [whole.object_bytes(group, chunk_tokens) + _HEADER_BYTES for group in groups]
        self._used: Counter[int] = Counter()
        self._facts: dict[tuple[int, int], TierFacts] = {}
        self._pace: BreakEven | None = None
        chunks = {tier: max(1, size // sum(self._sizes)) for tier, size in self._bounds.items()}
        self._tiered = bool(capacities)
        rule: Admit | None = None
        if config.admission == "second":
            # One Bloom filter for all groups, hence as many objects per chunk.
            rule = SecondHit(self.has_room, {tier: n * len(groups) for tier, n in chunks.items()})
        elif config.admission == "adaptive":
            lead = next((g for g in groups if whole.groups[g].rule.kind == "all"), 0)
            rule = Adaptive(self.has_room, chunks, group=lead, groups=len(groups))
        if config.prefill_tokens_per_s is not None:
            # Each rank loads its own part of a chunk, all groups of it; the ranks load at the same time.
            part = max(sum(spec.object_bytes(g, chunk_tokens) for g in groups) for spec in specs)
            rule = self._pace = BreakEven(lambda group: part, rule)
            for _ in range(BreakEven.FEW):
                self._pace.computed(chunk_tokens, chunk_tokens / config.prefill_tokens_per_s)
        self._rule = rule

    @property
    def bounded(self) -> list[int]:
        """Tiers whose used bytes have to be measured; none if the rule does not use them."""
        return list(self._bounds) if self.active else []

    @property
    def active(self) -> bool:
        """Whether anything may be refused, see `Config.selective`; never without tiers."""
        return self._rule is not None and self._tiered

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        if self._rule is not None and not self._rule(tier, name):
            return False
        self._used[tier] += self._sizes[name.group]
        return True

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """See `lmcache.control.admission.rules.Learns`."""
        learn = getattr(self._rule, "asked", None)
        if learn is not None:
            learn(digests, near, found)

    def has_room(self, tier: int) -> bool:
        """Whether another object fits without an eviction from the tier."""
        bound = self._bounds.get(tier)
        return bound is None or self._used[tier] + max(self._sizes) <= bound

    def measured(self, rank: int, facts: Sequence[TierFacts]) -> None:
        """Applies a rank's measurements of its tiers."""
        for tier, new in enumerate(facts):
            self._used[tier] = new.used  # ranks share the folder, or have folders that fill equally
            old = self._facts.setdefault((rank, tier), new)
            if new.loaded - old.loaded >= _SAMPLE_BYTES:
                if self._pace is not None:
                    self._pace.loaded(tier, new.loaded - old.loaded, new.busy - old.busy)
                self._facts[rank, tier] = new

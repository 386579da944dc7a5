"""Synthetic request traces: typical access patterns for cache policies, generated from a seed.

A trace is a list of requests ordered by time. Blocks are identified by integers; a request lists the blocks of its prompt in
order, and two prompts share a block id exactly if they are equal up to the end of that block. So the blocks form a forest, as
chunk digests do.

Every generator takes the number of requests and a seed, and returns the same trace for the same arguments on every machine
(`random.Random`, no NumPy). `SUITE` has a trace of each pattern; the robustness table is computed from it.
"""

from __future__ import annotations

import heapq
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, count
from random import Random
from types import MappingProxyType
from typing import NamedTuple

BLOCK_TOKENS = 512
"""Tokens per block, as in the published Mooncake traces."""


class Request(NamedTuple):
    """One prompt. `blocks`: ids of its full blocks and of the last, partial one."""

    time: float
    input_tokens: int
    output_tokens: int
    blocks: list[int]


Trace = list[Request]


def _request(time: float, blocks: list[int], output_tokens: int = 256) -> Request:
    return Request(time, len(blocks) * BLOCK_TOKENS, output_tokens, blocks)


def _take(names: Iterable[int], n: int) -> list[int]:
    return [name for name, _ in zip(names, range(n), strict=False)]


def _zipf(n: int, skew: float) -> list[float]:
    """Cumulative weights of ranks 1…n, proportional to rank^−skew."""
    return list(accumulate(rank**-skew for rank in range(1, n + 1)))


def _draw(random: Random, cumulative: Sequence[float]) -> int:
    return bisect(cumulative, random.random() * cumulative[-1], hi=len(cumulative) - 1)


def documents(
    requests: int,
    seed: int,
    *,
    documents: int = 400,
    blocks: int = 20,
    question: int = 1,
    skew: float = 1.0,
    rate: float = 3.0,
) -> Trace:
    """Questions on documents: a document of about `blocks` blocks (half to double), drawn from a Zipf distribution with
    exponent `skew`, followed by `question` unique blocks. Poisson arrivals, `rate` per second.
    """
    random, fresh = Random(seed), count()
    bodies = [_take(fresh, max(1, int(blocks * 2 ** random.uniform(-1, 1)))) for _ in range(documents)]
    weights = _zipf(documents, skew)
    time, trace = 0.0, []
    for _ in range(requests):
        time += random.expovariate(rate)
        trace.append(_request(time, bodies[_draw(random, weights)] + _take(fresh, question)))
    return trace


def agents(
    requests: int, seed: int, *, agents: int = 20, system: int = 10, step: int = 2, steps: int = 25, pause: float = 5.0
) -> Trace:
    """Agent loops: `agents` concurrent agents share a system prompt of `system` blocks; each call repeats the whole context
    and adds up to twice `step` blocks. A loop ends after about `steps` calls and a new task begins. Pauses between calls are
    exponential with mean `pause` seconds.
    """
    random, fresh = Random(seed), count()
    shared = _take(fresh, system)
    contexts = [list(shared) for _ in range(agents)]
    due = [(random.expovariate(1 / pause), i) for i in range(agents)]
    heapq.heapify(due)
    trace: Trace = []
    while len(trace) < requests:
        time, i = heapq.heappop(due)
        contexts[i] = contexts[i] + _take(fresh, random.randint(1, 2 * step))
        trace.append(_request(time, contexts[i]))
        if random.random() < 1 / steps:
            contexts[i] = list(shared)
        heapq.heappush(due, (time + random.expovariate(1 / pause), i))
    return trace


def chats(
    requests: int,
    seed: int,
    *,
    rate: float = 1.5,
    stay: float = 0.6,
    first: int = 8,
    turn: int = 3,
    gap: Callable[[Random], float] = lambda random: random.lognormvariate(4.8, 0.8),
    system: int = 1,
) -> Trace:
    """Conversations, of which `rate` per second begin, with a system prompt of `system` blocks. After each answer the user
    continues with probability `stay`, after `gap(random)` seconds. The first prompt has about `first` blocks (exponential),
    each turn adds about `turn`.
    """
    random, fresh = Random(seed), count()
    shared = _take(fresh, system)
    order = count()
    due: list[tuple[float, int, list[int]]] = [(0.0, next(order), [])]
    trace: Trace = []
    while len(trace) < requests:
        time, _, context = heapq.heappop(due)
        if not context:
            heapq.heappush(due, (time + random.expovariate(rate), next(order), []))
            context = shared + _take(fresh, 1 + int(random.expovariate(1 / first)))
        else:
            context = context + _take(fresh, 1 + int(random.expovariate(1 / turn)))
        trace.append(_request(time, context))
        if random.random() < stay:
            heapq.heappush(due, (time + gap(random), next(order), context))
    return trace


def loop(requests: int, seed: int, *, items: int = 50, blocks: int = 10, rate: float = 3.0) -> Trace:
    """A cyclic scan of `items` prompts of `blocks` blocks: LRU hits always or never. `seed` shuffles the order."""
    random, fresh = Random(seed), count()
    prompts = [_take(fresh, blocks) for _ in range(items)]
    random.shuffle(prompts)
    return [_request(i / rate, prompts[i % items]) for i in range(requests)]


def uniform(requests: int, seed: int, *, items: int = 400, blocks: int = 10, rate: float = 3.0) -> Trace:
    """Each request is one of `items` prompts of `blocks` blocks, uniformly random: all policies perform equally."""
    random, fresh = Random(seed), count()
    prompts = [_take(fresh, blocks) for _ in range(items)]
    return [_request(i / rate, random.choice(prompts)) for i in range(requests)]


def unique(requests: int, seed: int, *, blocks: int = 10, rate: float = 3.0) -> Trace:
    """Prompts that never recur."""
    random, fresh = Random(seed), count()
    return [_request(i / rate, _take(fresh, random.randint(1, 2 * blocks - 1))) for i in range(requests)]


def stack(
    requests: int, seed: int, *, depth: float = 20.0, blocks: int = 6, novel: float = 0.1, rate: float = 3.0
) -> Trace:
    """The LRU stack model, the best case for LRU: with probability `novel` a new prompt, otherwise the k-th most recently
    used one, with k geometric of mean `depth`.
    """
    random, fresh = Random(seed), count()
    recent: list[list[int]] = []
    trace = []
    for i in range(requests):
        k = int(random.expovariate(1 / depth))
        prompt = _take(fresh, blocks) if k >= len(recent) or random.random() < novel else recent.pop(-1 - k)
        recent.append(prompt)
        trace.append(_request(i / rate, prompt))
    return trace


def scans(requests: int, seed: int, *, every: int = 500, length: int = 250, blocks: int = 12, **chat: float) -> Trace:
    """`chats` with scans: after every `every` requests, a burst of `length` prompts of `blocks` blocks that are used only once
    (an evaluation run, a batch job).
    """
    base = chats(requests, seed, **chat)  # type: ignore[arg-type]
    fresh = count(1 + max(block for request in base for block in request.blocks))
    trace: Trace = []
    for i, request in enumerate(base):
        trace.append(request)
        if i % every == every - 1:
            trace += [_request(request.time, _take(fresh, blocks)) for _ in range(length)]
    return trace[:requests]


def reruns(requests: int, seed: int, *, batch: int = 150, times: int = 3, blocks: int = 12, rate: float = 3.0) -> Trace:
    """Batches of about `batch` prompts (half to double) of up to twice `blocks` blocks after a shared one. Each batch runs once
    to `times` times in the same order: only a rerun shows whether it was worth keeping.
    """
    random, fresh = Random(seed), count()
    shared = _take(fresh, 1)
    prompts: list[list[int]] = []
    while len(prompts) < requests:
        size = int(batch * 2 ** random.uniform(-1, 1))
        prompts += [shared + _take(fresh, random.randint(1, 2 * blocks)) for _ in range(size)] * random.randint(
            1, times
        )
    return [_request(i / rate, prompt) for i, prompt in enumerate(prompts[:requests])]


def echo(trace: Trace, calm: float) -> Trace:
    """The first `calm` share of a trace, then its prompts again in reverse order: objects that a policy evicted based on the
    first part are all requested at once. The worst case for any policy but LRU.
    """
    first = trace[: int(len(trace) * calm)]
    back = reversed(first[max(0, 2 * len(first) - len(trace)) :])
    return first + [request._replace(time=trace[len(first) + i].time) for i, request in enumerate(back)]


def alternate(parts: Sequence[Trace], length: int) -> Trace:
    """Alternates between the traces, `length` requests at a time, until one ends. The traces share no blocks."""
    turns = min(map(len, parts)) // length
    moved = _disjoint(parts)
    return join([part[i * length : (i + 1) * length] for i in range(turns) for part in moved], apart=False)


def _disjoint(parts: Sequence[Trace]) -> list[Trace]:
    """Renumbers blocks so that no two traces share any."""
    moved, base = list[Trace](), 0
    for part in parts:
        moved.append([r._replace(blocks=[base + b for b in r.blocks]) for r in part])
        base += 1 + max(block for request in part for block in request.blocks)
    return moved


def phases(parts: Sequence[Trace]) -> Trace:
    """Concatenates traces without shared blocks: the workload changes abruptly."""
    return join(parts, apart=True)


def join(parts: Sequence[Trace], *, apart: bool) -> Trace:
    """Concatenates traces in time. `apart`: renumber the blocks so that the traces share none."""
    trace: Trace = []
    time, base = 0.0, 0
    for part in parts:
        trace += [r._replace(time=time + (r.time - part[0].time), blocks=[base + b for b in r.blocks]) for r in part]
        time = trace[-1].time
        if apart:
            base = 1 + max(block for request in trace for block in request.blocks)
    return trace


def mix(parts: Sequence[Trace]) -> Trace:
    """Merges traces by time, as of several tenants without shared blocks; ends with the shortest."""
    moved = _disjoint(parts)
    end = min(part[-1].time for part in moved)
    return [request for request in heapq.merge(*moved, key=lambda r: r.time) if request.time <= end]


def sample(trace: Trace, fraction: float, seed: int) -> Trace:
    """Samples about `fraction` of the conversations: requests are selected by the second block of their prompt (the first is
    often a shared system prompt), so that reuse is preserved.
    """
    salt = Random(seed).getrandbits(32)
    return [r for r in trace if Random(salt ^ r.blocks[min(1, len(r.blocks) - 1)]).random() < fraction]


def shuffle(trace: Trace, window: int, seed: int) -> Trace:
    """Shuffles the prompts (each moves by up to about `window` requests) and keeps the times."""
    random = Random(seed)
    moved = sorted(range(len(trace)), key=lambda i: i + random.uniform(-window, window))
    return [trace[i]._replace(time=at.time) for i, at in zip(moved, trace, strict=True)]


def stretch(trace: Trace, factor: float) -> Trace:
    """Slows a trace down by `factor`."""
    return [request._replace(time=request.time * factor) for request in trace]


def _fixed(seconds: float) -> Callable[[Random], float]:
    return lambda random: seconds


def _pareto(low: float, shape: float) -> Callable[[Random], float]:
    return lambda random: low * random.paretovariate(shape)


def _exponential(mean: float) -> Callable[[Random], float]:
    return lambda random: random.expovariate(1 / mean)


def _two_tenants(n: int, seed: int) -> Trace:
    fast = documents(n, seed, documents=60, blocks=10, rate=6.0)
    slow = chats(n // 2, seed + 1, rate=0.3)
    rare = documents(n // 4, seed + 2, documents=40, blocks=40, rate=0.4, skew=0.5)
    return mix([fast, slow, rare])


def _changes(n: int, seed: int) -> Trace:
    part = n // 4
    return phases(
        [
            chats(part, seed),
            documents(part, seed + 1),
            agents(part, seed + 2),
            stack(part, seed + 3, depth=80.0),
        ]
    )


SUITE: Mapping[str, Callable[[int, int], Trace]] = MappingProxyType(
    {
        "documents": documents,
        "documents, steep": lambda n, seed: documents(n, seed, skew=1.4),
        "documents, flat": lambda n, seed: documents(n, seed, skew=0.6, documents=1000),
        "documents, long questions": lambda n, seed: documents(n, seed, question=10),
        "agents": agents,
        "agents, many": lambda n, seed: agents(n, seed, agents=100, pause=30.0),
        "agents, short": lambda n, seed: agents(n, seed, agents=40, steps=4),
        "chats": chats,
        "chats, exponential gaps": lambda n, seed: chats(n, seed, gap=_exponential(60.0)),
        "chats, short gaps": lambda n, seed: chats(n, seed, gap=_exponential(10.0), stay=0.8),
        "chats, fixed gaps": lambda n, seed: chats(n, seed, gap=_fixed(90.0)),
        "chats, heavy-tailed gaps": lambda n, seed: chats(n, seed, gap=_pareto(10.0, 0.8)),
        "chats, seldom back": lambda n, seed: chats(n, seed, stay=0.15),
        "chats, always back": lambda n, seed: chats(n, seed, stay=0.95, gap=_exponential(120.0), turn=1),
        "scans over chats": scans,
        "scans over documents": lambda n, seed: mix(
            [documents(n, seed), unique(n // 3, seed + 1, blocks=20, rate=1.0)]
        ),
        "tenants": _two_tenants,
        "changes": _changes,
        "changes, loop to stack": lambda n, seed: phases(
            [loop(n // 2, seed, items=300), stack(n // 2, seed + 1, depth=60.0)]
        ),
        "changes, chats to stack": lambda n, seed: phases([chats(n // 2, seed), stack(n // 2, seed + 1, depth=60.0)]),
        "changes, stack to chats": lambda n, seed: phases([stack(n // 2, seed + 1, depth=60.0), chats(n // 2, seed)]),
        "stack": stack,
        "stack, deep": lambda n, seed: stack(n, seed, depth=200.0),
        "stack, nothing new": lambda n, seed: stack(n, seed, depth=40.0, novel=0.01),
        "loop": loop,
        "loop, long": lambda n, seed: loop(n, seed, items=n // 5),
        "alternating": lambda n, seed: alternate([chats(n // 2, seed), stack(n // 2, seed + 1, depth=40.0)], 100),
        "days and nights": lambda n, seed: alternate(
            [chats(n // 2, seed, rate=4.0), stretch(chats(n // 2, seed + 1), 10.0)], max(50, n // 8)
        ),
        "tenants, a hundred to one": lambda n, seed: mix(
            [documents(n, seed, rate=10.0, skew=0.7), chats(n // 20, seed + 1, rate=0.05, first=30, turn=10)]
        ),
        "loop among chats": lambda n, seed: mix([chats(n, seed), loop(n // 3, seed, items=60, rate=0.7)]),
        "documents, then uniform": lambda n, seed: phases(
            [documents(n // 2, seed), uniform(n // 2, seed + 1, items=100)]
        ),
        "reruns": reruns,
        "reruns, twice": lambda n, seed: reruns(n, seed, batch=40, times=2),
        "echo of chats": lambda n, seed: echo(chats(n, seed), 0.5),
        "echo of documents": lambda n, seed: echo(documents(n, seed, question=6), 0.7),
        "uniform": uniform,
        "unique": unique,
    }
)
"""Name → (requests, seed) → trace."""

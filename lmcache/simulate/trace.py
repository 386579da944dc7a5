"""Request traces: the chunks and arrival time of each prompt. Two JSON Lines formats, distinguished by their fields.

    Mooncake   {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [int, …]}
    recorded   {"t": seconds, "tokens": tokens, "chunk_tokens": tokens, "keys": ["hex", …]}               `record_trace`

A Mooncake file does not contain its block size: 512 tokens in the published traces, other sizes in files that other tools write.
What a wrong size would mean is checked on every line.

Files are read line by line and kept as columns: 4 bytes per chunk of a request, about 100 bytes per distinct chunk.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from lmcache.errors import LMCacheError

MOONCAKE_BLOCK = 512
"""Tokens per block of the published Mooncake traces (FAST '25 release: "each hash id stands for 512 tokens")."""

_TOKEN_LIMIT = 1 << 40
"""Limit of every token count: more is a mistake, and would not fit into the columns."""


class TraceError(LMCacheError):
    """A trace cannot be used; the message has file, line and reason."""


class _BlockSizeError(TraceError):
    """A prompt's number of ids does not fit the block size."""


@dataclass
class _Skipped:
    """Lines left out. `misfits`: those with another number of ids than the block size means; `first`: the message of one."""

    lines: int = 0
    misfits: int = 0
    first: str = ""


class Request(NamedTuple):
    """One request. `blocks`: ids of its chunks in order, equal for equal prefixes; the last chunk may be partial."""

    time: float
    tokens: int
    output: int
    blocks: Sequence[int]


class Trace:
    """Requests ordered by time. `chunk_tokens`: tokens per chunk; `blocks`: number of distinct chunks."""

    def __init__(self, chunk_tokens: int = MOONCAKE_BLOCK) -> None:
        self.chunk_tokens = chunk_tokens
        self.blocks = 0
        self.skipped = 0
        self._times = array("d")
        self._tokens = array("q")
        self._outputs = array("q")
        self._ends = array("q", [0])
        self._ids = array("I")

    def add(self, request: Request) -> None:
        """Appends a request; `blocks` of the trace grows to cover its chunks."""
        self._times.append(request.time)
        self._tokens.append(request.tokens)
        self._outputs.append(request.output)
        self._ids.extend(request.blocks)
        self._ends.append(len(self._ids))
        self.blocks = max(self.blocks, 1 + max(request.blocks, default=-1))

    def __len__(self) -> int:
        return len(self._times)

    @property
    def accesses(self) -> int:
        """Total number of chunks of all requests."""
        return len(self._ids)

    def __iter__(self) -> Iterator[Request]:
        ids, ends = self._ids, self._ends
        for i, time in enumerate(self._times):
            yield Request(time, self._tokens[i], self._outputs[i], ids[ends[i] : ends[i + 1]])


class _Line(msgspec.Struct):
    """A line of either format; missing fields are None."""

    timestamp: float | None = None
    input_length: int | None = None
    output_length: int = 0
    hash_ids: list[int] | None = None
    t: float | None = None
    tokens: int | None = None
    chunk_tokens: int | None = None
    keys: list[str] | None = None


class _Numbering(dict[tuple[int, int] | str, int]):
    """Numbers distinct chunks in order of first appearance."""

    def __missing__(self, key: tuple[int, int] | str) -> int:
        self[key] = number = len(self)
        return number


def read_traces(paths: Iterable[str | Path], *, skip_bad: bool = False, block_tokens: int = MOONCAKE_BLOCK) -> Trace:
    """Reads traces as one stream. Several files are the traffic of several replicas on one cache, merged by time.

    Ids in Mooncake files are local to their file; keys in recorded files are global. `block_tokens`: tokens per block of
    Mooncake files.

    Raises:
        TraceError: a line is not a request, is earlier than the line before, or its blocks have another size; or there is no
            request at all. With `skip_bad`, bad lines are counted in `Trace.skipped` instead.
    """
    if not 1 <= block_tokens < _TOKEN_LIMIT:
        raise TraceError(f"{block_tokens} tokens per block are impossible; give a whole number from 1 up")
    numbers = _Numbering()
    chunk: list[int] = []
    skipped = _Skipped()
    parts = [
        list(_requests(Path(path), file, numbers, chunk, skip_bad, skipped, block_tokens))
        for file, path in enumerate(paths)
    ]
    requests = parts[0] if len(parts) == 1 else sorted((r for part in parts for r in part), key=lambda r: r.time)
    if not requests:
        raise TraceError(
            "no request in the trace" + (f"; {skipped.lines} bad lines were skipped" if skipped.lines else "")
        )
    if skipped.misfits > len(requests):  # what is left fits by chance
        raise TraceError(
            f"{skipped.misfits} lines do not fit the block size, {len(requests)} do; the first: {skipped.first}"
        )
    trace = Trace(chunk[0])
    for request in requests:
        trace.add(request)
    trace.skipped = skipped.lines
    return trace


def _requests(
    path: Path,
    file: int,
    numbers: _Numbering,
    chunk: list[int],
    skip_bad: bool,
    skipped: _Skipped,
    block_tokens: int,
) -> Iterator[Request]:
    decoder = msgspec.json.Decoder(_Line)
    before = -math.inf
    try:
        stream = path.open("rb")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from None
    with stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                time, tokens, output, size, keys = _parse(decoder.decode(text), block_tokens)
                if time < before:
                    raise TraceError(f"time {time:g} s is before the line above ({before:g} s); sort the file by time")
                if chunk and size != chunk[0]:
                    raise TraceError(f"{size} tokens per chunk, where the lines above have {chunk[0]}")
            except (msgspec.DecodeError, TraceError, UnicodeDecodeError) as error:
                if not skip_bad:
                    raise TraceError(f"{path}, line {number}: {error} (--skip-bad skips such lines)") from None
                skipped.lines += 1
                if isinstance(error, _BlockSizeError):
                    skipped.misfits += 1
                    skipped.first = skipped.first or str(error)
                continue
            before = time
            if not chunk:
                chunk.append(size)
            blocks = [numbers[k if isinstance(k, str) else (file, k)] for k in keys]
            yield Request(time, tokens, output, array("I", blocks))


def _parse(line: _Line, block_tokens: int) -> tuple[float, int, int, int, Sequence[int | str]]:
    """Returns (seconds, tokens, output tokens, chunk tokens, chunks).

    Raises:
        TraceError: the line is not a valid request; the message has the reason.
    """
    keys: Sequence[int | str] | None
    if line.keys is not None or line.t is not None:
        names, keys = ("t", "tokens", "chunk_tokens", "keys"), line.keys
        time, tokens, size = line.t, line.tokens, line.chunk_tokens
    else:
        names, keys = ("timestamp", "input_length", "", "hash_ids"), line.hash_ids
        time = None if line.timestamp is None else line.timestamp / 1000
        tokens, size = line.input_length, block_tokens
    values = (time, tokens, size, keys)
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise TraceError(f"field {', '.join(map(repr, missing))} is missing")
    assert time is not None
    assert tokens is not None
    assert size is not None
    assert keys is not None
    if not math.isfinite(time) or time < 0:
        raise TraceError(f"time {time!r} is not a number of seconds from 0 up")
    if not (0 <= tokens < _TOKEN_LIMIT and 0 <= line.output_length < _TOKEN_LIMIT and 1 <= size < _TOKEN_LIMIT):
        raise TraceError(f"impossible: {tokens} tokens, {line.output_length} output tokens, {size} tokens per chunk")
    if line.keys is None and line.t is None:
        _check_blocks(len(keys), tokens, size)
    elif len(keys) > -(-tokens // size):
        raise TraceError(f"{len(keys)} chunks of {size} tokens, but only {tokens} tokens")
    if len(set(keys)) != len(keys):
        raise TraceError("a chunk appears twice in one request; ids must cover everything before them")
    return time, tokens, line.output_length, size, keys


def _check_blocks(blocks: int, tokens: int, size: int) -> None:
    """Checks that a prompt of `tokens` tokens has as many blocks as blocks of `size` tokens are: all of them, or all full ones.

    Raises:
        TraceError: it has not; the message has a size that fits, if there is one.
    """
    if tokens // size <= blocks <= -(-tokens // size):
        return
    wanted = f"{tokens} tokens are {-(-tokens // size)} blocks of {size} tokens, but there are {blocks} ids"
    sizes = [n for n in (1 << power for power in range(20)) if blocks and tokens // n <= blocks <= -(-tokens // n)]
    hint = f", e.g. --block-tokens {sizes[0]}, if that is their size" if sizes else ""
    raise _BlockSizeError(f"{wanted}; give the number of tokens per block with --block-tokens{hint}")

"""`vllm serve` with the connector, as in production: chats through the OpenAI client, restarts, kills, a shared folder.

One scenario with three servers. Fixtures run each part once and record the results, which the tests check.

    first    a chat in three rounds, with vLLM's own cache dropped in between; then the server idles
    second   starts on the same folder while the first runs; each reads what the other has written
    third    starts after the first was killed during a response, and the second was stopped right after one
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from servelab import CHUNK, Message, Server, await_true, grown

from lmcache.errors import ConfigError
from lmcache_conformance.labs.damage import object_files, problem_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

EXTERNAL = "vllm:external_prefix_cache_hits_total"
FROM_DISK = 'vllm:prompt_tokens_cached_by_source_total{source="disk"}'
FROM_HOST = 'vllm:prompt_tokens_cached_by_source_total{source="host"}'
OUR_DRAM = 'lmcache_hit_tokens_total{tier="dram"}'
OUR_DISK = 'lmcache_hit_tokens_total{tier="disk"}'
OUR_TAIL = 'lmcache_miss_tokens_total{reason="tail"}'
CORRUPT = "lmcache_corruptions_total"
FAILED = "lmcache_failures_total"

ROUNDS = (
    "Which keeper counted most ships? Answer with a name and a number.",
    "And which one counted fewest? Say how sure you are, and why.",
    "Write one sentence about the two of them, as if for a local newspaper.",
)


def opening(topic: str) -> list[Message]:
    """Returns the start of a chat: a report of about 600 tokens."""
    report = " ".join(
        f"On day {day} the keeper of {topic} number {day * 7 % 31} counted {day * day % 97} ships."
        for day in range(1, 31)
    )
    return [{"role": "system", "content": f"You know this report. {report}"}]


@dataclass
class Answer:
    """One response, its request, and the metrics before and after it."""

    messages: list[Message]
    text: str
    before: Mapping[str, float]
    after: Mapping[str, float]

    def grew(self, name: str) -> float:
        return grown(self.before, self.after, name)

    @property
    def prompt(self) -> int:
        return int(self.grew("vllm:prompt_tokens_total"))

    @property
    def whole(self) -> int:
        """Tokens of its prompt that can be cached: whole chunks, without the last token."""
        return (self.prompt - 1) // CHUNK * CHUNK


def ask(server: Server, messages: list[Message], *, stream: bool = True, salt: str = "", tokens: int = 24) -> Answer:
    """Sends a request after emptying vLLM's own cache, so that all hits are ours."""
    before = server.settled()
    text = server.chat(messages, stream=stream, salt=salt, tokens=tokens)
    return Answer(list(messages), text, before, server.settled())


def chat(server: Server, topic: str, rounds: int = 3, salt: str = "") -> list[Answer]:
    """Runs a chat with streamed responses."""
    answers: list[Answer] = []
    messages = opening(topic)
    for question in ROUNDS[:rounds]:
        messages = [*messages, {"role": "user", "content": question}]
        answers.append(ask(server, messages, salt=salt))
        messages = [*messages, {"role": "assistant", "content": answers[-1].text}]
    return answers


# ---------------------------------------------------------------- the scenario


@dataclass
class Story:
    """Folders of the scenario, and its servers."""

    folder: Path
    model: Path
    stack: ExitStack
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def disk(self) -> Path:
        return self.folder / "kv"

    def start(self, *options: str) -> Server:
        log = self.folder / f"server{next(self.numbers)}.log"
        return self.stack.enter_context(Server(self.model, self.disk, log, options))


@dataclass
class First:
    server: Server
    rounds: list[Answer]
    whole: Answer
    recomputed: Answer
    files: list[Path]
    expected: int
    log: str


@dataclass
class Second:
    server: Server
    its_first: Answer
    answers: list[Answer]
    read_by_first: Answer


@dataclass
class Third:
    streamed: str
    survivor: Answer
    last_words: Answer
    objects_after_stop: int
    exit_status: int
    broken: dict[str, str]
    its_first: Answer
    of_last_words: Answer
    of_killed: Answer
    recomputed: Answer


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    from lmcache_hf.models import smollm2

    try:
        model = smollm2()
    except ConfigError as error:
        pytest.skip(str(error))
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="lmcache-serve-", dir=base))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield Story(folder, model, stack)


@pytest.fixture(scope="module")
def first(story: Story) -> First:
    server = story.start()
    rounds = chat(server, "lighthouse")
    last = rounds[-1]
    whole = ask(server, last.messages, stream=False)
    recomputed = ask(server, last.messages, salt="another tenant")
    # The server idles from here on; it must still write everything stored, including what the last step has computed.
    brief = ask(server, [*opening("tower"), {"role": "user", "content": ROUNDS[0]}], tokens=1)
    expected = (2 * last.whole + brief.whole) // CHUNK
    await_true(lambda: len(object_files(story.disk)) >= expected, f"{expected} objects are written")
    return First(server, rounds, whole, recomputed, object_files(story.disk), expected, server.log())


@pytest.fixture(scope="module")
def second(story: Story, first: First) -> Second:
    server = story.start("--shutdown-timeout", "60")
    its_first = ask(server, first.rounds[-1].messages)
    held = len(object_files(story.disk))
    answers = chat(server, "windmill", rounds=2)
    expected = held + answers[-1].whole // CHUNK
    await_true(lambda: len(object_files(story.disk)) >= expected, f"{expected} objects are written")
    return Second(server, its_first, answers, ask(first.server, answers[-1].messages))


@pytest.fixture(scope="module")
def third(story: Story, first: First, second: Second) -> Third:
    killed = [*opening("harbour"), {"role": "user", "content": ROUNDS[0]}]
    pieces = first.server.pieces(killed, tokens=400)
    streamed = "".join(itertools.islice(pieces, 3))
    first.server.kill9()

    survivor = ask(second.server, first.rounds[-1].messages)
    last_words = ask(second.server, [*opening("bridge"), {"role": "user", "content": ROUNDS[0]}])
    status = second.server.stop()
    after_stop = object_files(story.disk)
    broken = {path.name: problem for path in after_stop if (problem := problem_of(path))}

    server = story.start()
    return Third(
        streamed=streamed,
        survivor=survivor,
        last_words=last_words,
        objects_after_stop=len(after_stop),
        exit_status=status,
        broken=broken,
        its_first=ask(server, first.rounds[-1].messages),
        of_last_words=ask(server, last_words.messages),
        of_killed=ask(server, killed),
        recomputed=ask(server, killed, salt="a third tenant"),
    )


# ---------------------------------------------------------------- tests


def test_the_log_says_what_the_cache_is(first: First) -> None:
    for line in ("cache-settings", "cache-open", "cache-ready"):
        assert first.log.count(line) == 1, first.log[-4000:]
    for word in ("chunk_tokens=256", "tiers=\"['disk']\"", "dram_bytes=268435456"):
        assert word in first.log
    assert "cache-disabled" not in first.log
    assert "cache-off" not in first.log


def test_a_prompt_that_nobody_knows_is_computed(first: First) -> None:
    cold = first.rounds[0]
    assert cold.whole >= 2 * CHUNK  # otherwise the test shows nothing
    assert cold.grew(EXTERNAL) == 0
    assert cold.grew('lmcache_miss_tokens_total{reason="absent"}') == cold.whole
    assert cold.grew('lmcache_miss_tokens_total{reason="tail"}') == cold.prompt - cold.whole
    assert cold.grew("lmcache_stored_tokens_total") >= cold.whole


@pytest.mark.parametrize("number", [1, 2])
def test_later_rounds_of_a_chat_are_hits_in_vllms_metrics_and_in_ours(first: First, number: int) -> None:
    before, now = first.rounds[number - 1 : number + 1]
    assert now.grew(EXTERNAL) >= before.whole  # all of the previous round, possibly its response too
    assert now.grew(EXTERNAL) % CHUNK == 0
    assert now.grew(FROM_HOST) == now.grew(EXTERNAL) == now.grew(OUR_DRAM) == now.grew("lmcache_loaded_tokens_total")
    assert now.grew("lmcache_requested_tokens_total") == now.prompt
    misses = sum(now.grew(name) for name in now.after if name.startswith("lmcache_miss_tokens_total"))
    assert misses == now.prompt - now.grew(OUR_DRAM)


def test_a_whole_answer_is_the_streamed_one(first: First) -> None:
    assert first.whole.text == first.rounds[-1].text
    assert first.whole.grew(EXTERNAL) == first.whole.whole
    assert first.whole.grew(OUR_TAIL) == first.whole.prompt - first.whole.whole


def test_a_hit_says_what_recomputation_says_and_another_tenant_gets_no_hit(first: First) -> None:
    assert first.recomputed.grew(EXTERNAL) == 0
    assert first.recomputed.text == first.rounds[-1].text
    assert len(set(first.rounds[-1].text.split())) > 3  # the response is not trivial


def test_an_idle_server_writes_all_that_it_has_stored(first: First) -> None:
    assert len(first.files) >= first.expected
    assert [problem_of(path) for path in first.files] == [None] * len(first.files)


def test_a_new_server_serves_its_first_request_from_the_folder(first: First, second: Second) -> None:
    assert second.its_first.grew(FROM_DISK) == second.its_first.grew(OUR_DISK) == second.its_first.whole
    assert second.its_first.text == first.rounds[-1].text


def test_what_one_server_has_computed_is_a_hit_in_another_that_shares_its_folder(second: Second) -> None:
    answer, read = second.answers[-1], second.read_by_first
    assert answer.grew(EXTERNAL) > 0  # its own second round
    assert read.grew(FROM_DISK) == read.grew(OUR_DISK) == read.whole == answer.whole
    assert read.text == answer.text


def test_a_neighbours_death_disturbs_nobody(first: First, third: Third) -> None:
    assert third.streamed
    assert third.survivor.text == first.rounds[-1].text
    assert third.survivor.grew(EXTERNAL) == third.survivor.whole


def test_a_server_that_is_given_time_writes_all_before_it_stops(third: Third) -> None:
    assert third.exit_status == 0
    assert third.of_last_words.grew(FROM_DISK) == third.of_last_words.whole == third.last_words.whole > 0
    assert third.of_last_words.text == third.last_words.text


def test_kill_9_leaves_no_broken_object(third: Third) -> None:
    assert third.broken == {}
    assert third.objects_after_stop > 0


def test_after_kill_9_the_next_server_answers_right_and_from_the_folder(first: First, third: Third) -> None:
    assert third.its_first.grew(FROM_DISK) == third.its_first.whole
    assert third.its_first.text == first.rounds[-1].text
    assert third.of_killed.text == third.recomputed.text
    assert third.of_killed.text.startswith(third.streamed[: len(third.of_killed.text)])
    assert third.recomputed.grew(EXTERNAL) == 0


def test_nothing_was_corrupt_or_failed_in_all_of_it(first: First, second: Second, third: Third) -> None:
    for answer in (first.recomputed, second.read_by_first, third.last_words, third.recomputed):
        assert {k: v for k, v in answer.after.items() if k.startswith((CORRUPT, FAILED)) and v} == {}

"""The test bench of the engine suite: engines in child processes, random prompts, and checks with readable messages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lmcache_conformance.contract import PATIENT, Capabilities, Request, Response, SessionConfig
from lmcache_conformance.engines.forked import ForkedSession
from lmcache_conformance.labs.alike import shown
from lmcache_conformance.labs.models import MODELS, model_folder, vocabulary
from lmcache_conformance.remote.child import RemoteSession
from lmcache_conformance.runner.discover import find_adapter

F = TypeVar("F", bound=Callable[..., Any])
_ON = "_lmcache_on"


@dataclass(frozen=True)
class Case:
    """A model in a dtype."""

    model: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}"

    @property
    def exact(self) -> bool:
        """Whether greedy tokens in this dtype are independent of how a prompt was split."""
        return self.dtype in ("float32", "float64")


@dataclass(frozen=True)
class On:
    """The cases on which a test runs; see `on`."""

    exact_only: bool = False
    quick: tuple[str, ...] | None = None
    dtypes: int | None = None
    only: tuple[str, ...] | None = None


def on(
    *quick: str, exact_only: bool = False, dtypes: int | None = None, only: tuple[str, ...] | None = None
) -> Callable[[F], F]:
    """Decorator: runs a test on fewer cases.

    Args:
        quick: models for the quick budget; all by default. If none of them is claimed, the first claimed one.
        exact_only: only dtypes whose greedy tokens do not depend on the split.
        dtypes: for the quick budget, only the first so many claimed dtypes.
        only: only these models, whatever the budget.
    """

    def mark(test: F) -> F:
        setattr(test, _ON, On(exact_only, quick or None, dtypes, only))
        return test

    return mark


def cases_for(test: object, capabilities: Capabilities, budget: str) -> list[Case]:
    """Returns the cases of one test. The quick budget leaves out large models."""
    where: On = getattr(test, _ON, On())
    models = [model for model in capabilities.models if model in (where.only or MODELS)]
    dtypes = list(capabilities.dtypes)
    if budget == "quick":
        models = [model for model in models if model != "smollm2"] or models
        if where.quick:
            models = [model for model in models if model in where.quick] or models[:1]
        dtypes = dtypes[: where.dtypes]
    cases = [Case(model, dtype) for model in models for dtype in dtypes]
    return [case for case in cases if case.exact or not where.exact_only]


@dataclass
class History:
    """Everything that was ever stored in a cache; nothing else may hit."""

    stored: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def add(self, request: Request, response: Response) -> None:
        """Records that this prompt and its generated tokens may be in the cache."""
        self.stored.append((request.salt, request.tokens + response.tokens))

    def longest(self, request: Request) -> int:
        """Returns how many leading tokens of a prompt were ever stored with its salt."""
        return max((_common(request.tokens, tokens) for salt, tokens in self.stored if salt == request.salt), default=0)

    def forget(self, salt: str | None = None) -> None:
        """Drops all records (of one tenant), after the cache was cleared."""
        self.stored = [] if salt is None else [(s, t) for s, t in self.stored if s != salt]


class Engine:
    """A session whose responses are checked for plausibility, against the history of the cache among others."""

    def __init__(self, session: RemoteSession, case: Case, capabilities: Capabilities, history: History) -> None:
        self.session = session
        self.case = case
        self.history = history
        self._capabilities = capabilities
        self._ends = end_tokens(session_model(case))

    # ---------------------------------------------------------------- requests

    def ask(self, prompt: Request | Sequence[int], *, keep_device_cache: bool = False, **more: Any) -> Response:
        """Runs one request with the cache."""
        return self.ask_all([_request(prompt, more)], keep_device_cache=keep_device_cache)[0]

    def ask_all(self, requests: Sequence[Request], *, keep_device_cache: bool = False) -> list[Response]:
        """Runs several requests at once with the cache. Empties the engine's own cache before, which would hide ours."""
        if self._capabilities.device_cache and not keep_device_cache:
            self.drop_device_cache()
        responses = self.session.generate(requests)
        before = History(list(self.history.stored))
        for request, response in zip(requests, responses, strict=True):
            self.history.add(request, response)
        for request, response in zip(requests, responses, strict=True):
            self._check(request, response, self.history if len(requests) > 1 else before)
        return responses

    def recompute(self, prompt: Request | Sequence[int], **more: Any) -> Response:
        """Runs one request without the cache, in the split in which a hit on it was computed."""
        return self.recompute_all([_request(prompt, more)])[0]

    def recompute_all(self, requests: Sequence[Request]) -> list[Response]:
        """Recomputes several requests, one after another."""
        responses = [self.session.generate([request], reuse=False)[0] for request in requests]
        for request, response in zip(requests, responses, strict=True):
            self._check(request, response, History())
        return responses

    def _check(self, request: Request, response: Response, history: History) -> None:
        """Checks what must hold for every response."""
        what = f"prompt of {len(request.tokens)} tokens{f', salt {shown(request.salt)}' if request.salt else ''}"
        if request.cancel_after:
            assert len(response.tokens) <= request.max_new_tokens, f"{what}: more tokens than requested after a cancel"
        else:
            assert not response.error, f"{what}: the engine returned an error: {response.error}"
            ended = bool(response.tokens) and response.tokens[-1] in self._ends
            assert len(response.tokens) == request.max_new_tokens or (
                ended and len(response.tokens) < request.max_new_tokens
            ), f"{what}: {len(response.tokens)} tokens generated instead of {request.max_new_tokens}, and no end token"
            if self._capabilities.logprobs:
                counts = f"{len(response.logprobs)} for {len(response.tokens)} tokens"
                assert len(response.logprobs) == len(response.tokens), (
                    f"{what}: log-probs are claimed, but there are {counts}"
                )
                assert all(response.logprobs), f"{what}: log-probs are claimed, but some are empty"
        for source, tokens in response.cached.items():
            assert tokens >= 0, f"{what}: reports {tokens} tokens cached from {source!r}"
        total = sum(response.cached.values())
        assert total < max(1, len(request.tokens)), (
            f"{what}: reports {total} cached tokens, but the last prompt token always has to be computed"
        )
        stored = history.longest(request)
        assert response.hit <= stored, (
            f"{what}: reports a hit of {response.hit} tokens {dict(response.cached)}, which is impossible: only {stored} of "
            "its leading tokens were ever stored"
        )

    def log(self) -> str:
        """Returns the last lines that the engine wrote, for failure messages."""
        lines = self.session.stderr().strip().splitlines()[-8:]
        return "\nlast lines of the engine's stderr:\n" + "\n".join(lines) if lines else ""

    # ---------------------------------------------------------------- the rest of the session

    def flush(self) -> None:
        """Blocks until everything stored so far is on the lower tiers."""
        self.session.flush()

    def clear(self, salt: str | None = None) -> None:
        """Clears the cache (of one tenant) and the history."""
        self.session.clear(salt)
        self.history.forget(salt)

    def drop_device_cache(self) -> None:
        """Empties the engine's own prefix cache."""
        self.session.drop_device_cache()

    def close(self) -> None:
        """Closes the session regularly."""
        self.session.close()

    def kill9(self) -> None:
        """Kills the engine's processes with SIGKILL."""
        self.session.kill9()


class Bench:
    """Opens and closes the engines of one test class and case.

    The engines of `shared` and `cold` live until the class's tests of that case have ended; each test uses new prompts.
    """

    def __init__(
        self,
        adapter: str,
        capabilities: Capabilities,
        case: Case,
        folder: Path,
        *,
        chunk_tokens: int,
        timeout_s: float,
    ) -> None:
        self.adapter = adapter
        self.capabilities = capabilities
        self.case = case
        self.folder = folder
        self.chunk_tokens = chunk_tokens
        self.timeout_s = timeout_s
        self.rng = random.Random(0)
        self.options: Mapping[str, Any] = {}
        self._shared: dict[str, Engine] = {}
        self._folders = 0

    # ---------------------------------------------------------------- engines

    def new_folder(self, name: str = "disk") -> Path:
        """Returns an unused path for a disk tier's folder."""
        self._folders += 1
        return self.folder / f"{name}-{self._folders}"

    @contextmanager
    def open(
        self,
        *,
        case: Case | None = None,
        model: Path | None = None,
        history: History | None = None,
        options: Mapping[str, Any] | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        forked: bool = True,
        **cache: Any,
    ) -> Iterator[Engine]:
        """Context manager: an engine in a new process.

        Args:
            case: by default the bench's.
            model: model folder; by default the case's.
            history: what the cache may already contain.
            options: of the adapter; by default the bench's.
            cwd, environment: of the process.
            forked: the process may be forked from one that has imported the engine.
            **cache: cache settings.
        """
        engine = self._start(
            case or self.case,
            model,
            history,
            self.options if options is None else options,
            cwd,
            environment,
            cache,
            forked,
        )
        with engine.session:
            yield engine

    def shared(self) -> Engine:
        """Returns an engine with ample DRAM and disk, shared by all tests of this case."""
        return self._keep_open("shared", dram_bytes="256MiB", disk_path=str(self.shared_disk))

    @property
    def shared_disk(self) -> Path:
        """The disk tier's folder of `shared`."""
        return self.folder / "shared"

    def cold(self) -> Engine:
        """Returns an engine that recomputes every prompt in one shot: the oracle for exact dtypes."""
        engine = self._keep_open("cold", dram_bytes="1MiB")
        engine.session.forget_splits()
        return engine

    def _keep_open(self, name: str, **cache: Any) -> Engine:
        engine = self._shared.get(name)
        if engine is None or not engine.session.alive:
            engine = self._shared[name] = self._start(self.case, None, None, self.options, None, None, cache)
        return engine

    def _start(
        self,
        case: Case,
        model: Path | None,
        history: History | None,
        options: Mapping[str, Any],
        cwd: Path | None,
        environment: Mapping[str, str] | None,
        cache: Mapping[str, Any],
        forked: bool = True,
    ) -> Engine:
        config = SessionConfig(
            model=str(model or session_model(case)),
            dtype=case.dtype,
            cache={"chunk_tokens": self.chunk_tokens, **PATIENT, **cache},
            options=dict(options),
        )
        environment = {"HF_HUB_OFFLINE": "1", **(environment or {})}
        preload = getattr(find_adapter(self.adapter), "preload", None)
        session: RemoteSession
        if forked and preload:
            session = ForkedSession(
                self.adapter, config, preload=preload, timeout_s=self.timeout_s, folder=cwd, environment=environment
            )
        else:
            session = RemoteSession(self.adapter, config, timeout_s=self.timeout_s, folder=cwd, environment=environment)
        return Engine(session, case, self.capabilities, history if history is not None else History())

    def right(
        self, engine: Engine, prompt: Request | Sequence[int], response: Response, what: str, *, alone: bool = True
    ) -> None:
        """Asserts that a response equals recomputation in the same split; without that capability, a one-shot run.

        Args:
            engine: the engine that responded.
            prompt: of the request.
            response: to check.
            what: names the request in failure messages.
            alone: no other request ran at the same time.
        """
        if self.capabilities.same_split and (alone or self.capabilities.batch_invariant):
            same_answer(response, engine.recompute(prompt), what)
        elif self.case.exact:
            same_tokens(response, self.cold().recompute(prompt), what)

    def close(self) -> None:
        """Kills the shared engines."""
        engines, self._shared = list(self._shared.values()), {}
        for engine in engines:
            engine.kill9()

    # ---------------------------------------------------------------- prompts

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """Returns a random prompt of so many tokens."""
        return tuple(self.rng.choices(vocabulary(self.case.model), k=tokens))

    def chunks(self, count: int, *, more: int = 3) -> tuple[int, ...]:
        """Returns a random prompt of `count` chunks and `more` tokens."""
        return self.prompt(count * self.chunk_tokens + more)

    def whole(self, tokens: int) -> int:
        """Returns `tokens` rounded down to a chunk boundary."""
        return tokens // self.chunk_tokens * self.chunk_tokens


# ------------------------------------------------------------------ checks


def same_tokens(got: Response, want: Response, what: str) -> None:
    """Asserts the same greedy tokens."""
    if got.tokens != want.tokens:
        at = _common(got.tokens, want.tokens)
        raise AssertionError(
            f"{what}: wrong tokens from generated token {at + 1} on: {list(got.tokens[at : at + 5])} instead of "
            f"{list(want.tokens[at : at + 5])} (hit: {dict(got.cached)})"
        )


def same_bits(got: Response, want: Response, what: str) -> None:
    """Asserts the same greedy tokens and the same log-probs, bit for bit."""
    same_tokens(got, want, what)
    for step, (mine, other) in enumerate(zip(got.logprobs, want.logprobs, strict=True)):
        if mine != other:
            differ = sum(a != b for a, b in zip(mine, other, strict=False)) + abs(len(mine) - len(other))
            raise AssertionError(
                f"{what}: the log-probs of generated token {step + 1} differ in {differ} of {len(other)} bytes "
                f"(hit: {dict(got.cached)}; log-prob of the sampled token: {_at(got.logprob, step)} instead of "
                f"{_at(want.logprob, step)})"
            )


def same_answer(got: Response, want: Response, what: str) -> None:
    """Asserts equality as exactly as the engine allows: of log-prob bits if it reports them, else of tokens."""
    if got.logprobs and want.logprobs:
        same_bits(got, want, what)
    else:
        same_tokens(got, want, what)


def varied(responses: Sequence[Response]) -> None:
    """Asserts that the responses contain different tokens: comparing constant output would prove nothing."""
    tokens = {token for response in responses for token in response.tokens}
    assert len(tokens) > 3, f"all responses consist of the tokens {sorted(tokens)}: the comparison proves nothing"


def _at(values: Sequence[float], step: int) -> str:
    return f"{values[step]:.6g}" if step < len(values) else "not reported"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _request(prompt: Request | Sequence[int], more: Mapping[str, Any]) -> Request:
    if isinstance(prompt, Request):
        return msgspec.structs.replace(prompt, **more)
    return Request(tokens=tuple(prompt), **more)


# ------------------------------------------------------------------ models


def session_model(case: Case) -> Path:
    """Returns the folder of a case's model."""
    return _model_folder(case.model)


@cache
def _model_folder(name: str) -> Path:
    return model_folder(name)


@cache
def end_tokens(model: Path) -> frozenset[int]:
    """Returns the token ids that end a response, read from the model folder."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = model / name
        ends = msgspec.json.decode(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return frozenset(found)

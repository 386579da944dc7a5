"""Levels `keys`, `isolation`, `reset`: keys cover whatever changes values, tenants are isolated, cleared KV is gone."""

from __future__ import annotations

import shutil
from dataclasses import replace

from lmcache_conformance.contract import Level, Request
from lmcache_conformance.engines.base import EngineBase
from lmcache_conformance.engines.bench import Bench, Engine, on, same_answer, same_tokens, session_model
from lmcache_conformance.labs.alike import ALIKE, shown
from lmcache_conformance.labs.models import TINY, model_folder, vocabulary
from lmcache_conformance.runner.marks import level, requires


class NameTests(EngineBase):
    """Which request may hit which KV."""

    # ---------------------------------------------------------------- keys

    @level(Level.KEYS)
    @requires("restart")
    @on("llama", dtypes=1, only=TINY)
    def test_other_weights_under_the_same_path_do_not_hit(self, bench: Bench) -> None:
        """Folder and files keep their names; only the weights change."""
        place, disk = bench.new_folder("model"), bench.new_folder()
        shutil.copytree(session_model(bench.case), place)
        prompt = bench.chunks(4)
        with bench.open(model=place, dram_bytes="64MiB", disk_path=str(disk)) as engine:
            old = engine.ask(prompt)
            history = engine.history
        shutil.copytree(model_folder(bench.case.model, seed=2), place, dirs_exist_ok=True)
        with bench.open(model=place, dram_bytes="64MiB", disk_path=str(disk), history=history) as engine:
            new = engine.ask(prompt)
            assert new.hit == 0, (
                f"a hit of {dict(new.cached)} on KV that was computed with other weights under the same path"
            )
            assert new.tokens != old.tokens, "other weights generate the same tokens: the comparison proves nothing"
            assert engine.ask(prompt).hit > 0

    @level(Level.KEYS)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_another_dtype_does_not_hit(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = bench.chunks(4)
        engine.ask(prompt)
        engine.flush()
        for dtype in bench.capabilities.dtypes:
            if dtype != bench.case.dtype:
                self._misses(bench, engine, prompt, f"dtype {dtype}", dtype=dtype)

    @level(Level.KEYS)
    @requires("restart")
    @on("llama", dtypes=1)
    def test_another_model_does_not_hit(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = tuple(bench.rng.choices(vocabulary(TINY[0]), k=len(bench.chunks(4))))  # ids valid for every model
        engine.ask(prompt)
        engine.flush()
        others = [model for model in bench.capabilities.models if model in TINY and model != bench.case.model]
        for model in others[:1]:
            self._misses(bench, engine, prompt, f"model {model}", model=model)

    def _misses(self, bench: Bench, writer: Engine, prompt: tuple[int, ...], what: str, **other: str) -> None:
        case = replace(bench.case, **other)
        with bench.open(
            case=case, dram_bytes="64MiB", disk_path=str(bench.shared_disk), history=writer.history
        ) as engine:
            first = engine.ask(prompt)
            assert first.hit == 0, f"{what}: a hit of {dict(first.cached)} on KV of {bench.case}"
            again = engine.ask(prompt)
            assert again.hit > 0, f"{what}: no hit on its own KV either"
            if bench.capabilities.same_split:
                same_answer(again, engine.recompute(prompt), what)

    # ---------------------------------------------------------------- isolation

    @level(Level.ISOLATION)
    @requires("salt")
    @on(dtypes=1)
    def test_tenants_never_share_a_hit(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = bench.chunks(4)
        salts = ["tenant-a", "tenant-b", "", "tenant-A", "tenant-a "]
        for salt in salts:
            engine.drop_device_cache()
            response = engine.ask(prompt, salt=salt, max_new_tokens=1)
            assert response.hit == 0, (
                f"salt {salt!r}: a hit of {dict(response.cached)} on KV of another salt in {salts}"
            )
        for salt in salts:
            engine.drop_device_cache()
            response = engine.ask(prompt, salt=salt)
            assert response.hit == bench.whole(len(prompt)), (
                f"salt {salt!r}: a hit of only {dict(response.cached)} on its own prompt"
            )
            if bench.capabilities.same_split:
                same_answer(response, engine.recompute(prompt, salt=salt), f"salt {salt!r}")

    @level(Level.ISOLATION)
    @requires("salt")
    @on("llama", dtypes=1)
    def test_salts_that_differ_late_or_little_are_different_tenants(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = bench.chunks(2)
        for salt in ALIKE:
            engine.drop_device_cache()
            response = engine.ask(prompt, salt=salt, max_new_tokens=1)
            assert response.hit == 0, f"salt {shown(salt)}: a hit of {dict(response.cached)} on KV of a salt like it"
        for salt in ALIKE:
            engine.drop_device_cache()
            response = engine.ask(prompt, salt=salt, max_new_tokens=1)
            assert response.hit == bench.whole(len(prompt)), (
                f"salt {shown(salt)}: a hit of only {dict(response.cached)} on its own prompt"
            )

    @level(Level.ISOLATION)
    @requires("salt", "restart")
    @on("llama", dtypes=1)
    def test_tenants_stay_apart_in_a_new_process(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = bench.chunks(4)
        engine.ask(prompt, salt="tenant-a")
        engine.flush()
        with bench.open(dram_bytes="64MiB", disk_path=str(bench.shared_disk), history=engine.history) as later:
            for salt in ("tenant-b", ""):
                response = later.ask(prompt, salt=salt)
                assert response.hit == 0, (
                    f"salt {salt!r}: a hit of {dict(response.cached)} on tenant-a's KV in a new process"
                )
            assert later.ask(prompt, salt="tenant-a").hit == bench.whole(len(prompt))

    # ---------------------------------------------------------------- reset

    @level(Level.RESET)
    @on("llama", "gemma3", dtypes=1)
    def test_after_a_clear_nothing_is_served(self, bench: Bench) -> None:
        disk = bench.new_folder()
        prompts = [bench.chunks(4) for _ in range(3)]
        with bench.open(dram_bytes="64MiB", disk_path=str(disk)) as engine:
            first = [engine.ask(prompt) for prompt in prompts]
            engine.ask(bench.chunks(6))  # its write-back has not ended yet
            engine.clear()
            engine.drop_device_cache()
            self._all_gone(engine, prompts[:2], "after clear()")
            again = engine.ask(prompts[2])
            assert again.hit == 0, f"after clear(): a hit of {dict(again.cached)}"
            same_tokens(again, first[2], "recomputed after clear()")
            assert engine.ask(prompts[2]).hit > 0, "after clear() nothing is stored any more"
            engine.clear()
            engine.flush()
        if bench.capabilities.restart:
            with bench.open(dram_bytes="64MiB", disk_path=str(disk), history=engine.history) as later:
                self._all_gone(later, prompts, "after clear(), in a new process")

    def _all_gone(self, engine: Engine, prompts: list[tuple[int, ...]], when: str) -> None:
        for prompt in prompts:
            response = engine.ask(prompt)  # fails on any hit itself if the history was cleared, too
            assert response.hit == 0, f"{when}: a hit of {dict(response.cached)}"

    @level(Level.RESET)
    @requires("salt", "tenant_clear")
    @on("llama", dtypes=1)
    def test_clearing_one_tenant_leaves_the_others(self, bench: Bench) -> None:
        engine = bench.shared()
        prompt = bench.chunks(4)
        for salt in ("leaves", "stays"):
            engine.ask(Request(tokens=prompt, salt=salt))
        engine.clear("leaves")
        engine.drop_device_cache()
        gone = engine.ask(prompt, salt="leaves")
        assert gone.hit == 0, f"the cleared tenant: a hit of {dict(gone.cached)}"
        kept = engine.ask(prompt, salt="stays")
        assert kept.hit == bench.whole(len(prompt)), f"the other tenant: a hit of only {dict(kept.cached)}"

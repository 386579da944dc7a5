"""SGLang: conversations that take turns in memory too small for them. Rounds served from storage, beside recomputation.

Four engines run side by side, alike but for what they have beneath: HiCache with nothing (what was evicted is computed again),
with SGLang's own `file` backend, with LMCache; and LMCache's linker, where evicted pages wait in DRAM. Every round asks each of
them in turn, in changing order, so that whatever else the machine does hits all of them. TTFT is the time to the first token of
one request with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

KINDS = ("recompute", "file", "lmcache", "linker")
PAGE = 16
HICACHE: dict[str, Any] = {
    "hicache_ratio": 1.1,
    "hicache_write_policy": "write_through",
    "hicache_storage_prefetch_policy": "wait_complete",
}

EXAMPLES = """\
examples:
  sglang_multi_round.py                                 real model, about 8 minutes on two cores
  sglang_multi_round.py --json > rounds.json            one JSON object, progress on standard error
  sglang_multi_round.py --model llama --first 512       tiny random model, a quick look
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, llama, or a folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="the first of them only fills")
    parser.add_argument("--first", type=int, default=1024, help="tokens of a conversation's first prompt")
    parser.add_argument("--more", type=int, default=64, help="tokens that a round adds")
    parser.add_argument("--new", type=int, default=8, help="tokens generated per round")
    parser.add_argument("--folder", default="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    folder = tempfile.mkdtemp(prefix="lmcache-sglang-", dir=options.folder)
    try:
        out = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(out))
    else:
        for kind in KINDS:
            found = out["ttft_s"][kind]
            print(
                f"{kind:10}  TTFT {found['median']:.3f} s ({found['low']:.3f}–{found['high']:.3f})  "
                f"{out['tokens_per_s'][kind]:.0f} tokens/s  from storage {out['from_storage'][kind]:.0%}"
            )
        ratio = out["ttft_ratio"]
        print(f"TTFT of lmcache: {ratio['file']:.2f} × that of file, {ratio['recompute']:.2f} × that of computing")
        print(f"TTFT of linker: {out['linker_ttft_ratio']:.2f} × that of computing")
        print(f"answers equal: {out['answers_equal']}")


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """All rounds of all of them."""
    random.seed(0)
    longest = options.first + options.rounds * (options.more + options.new)
    room = -(-longest * 3 // 2 // PAGE) * PAGE  # one conversation and a half
    context = multiprocessing.get_context("spawn")
    engines: dict[str, Connection[Any, Any]] = {}
    processes = []
    for kind in KINDS:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, kind, vars(options), room, f"{folder}/{kind}"))
        process.start()
        theirs.close()
        processes.append(process)
        engines[kind] = ours
        said = ours.recv()
        _tell(f"{kind}: {said}")
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    totals = dict.fromkeys(KINDS, 0.0)
    stored = dict.fromkeys(KINDS, 0)
    tokens, possible, equal, ratios = 0, 0, 0, {kind: [] for kind in KINDS}
    low, high = (1000, 40_000) if options.model == "smollm2" else (3, 1000)
    prompts = [[random.randrange(low, high) for _ in range(options.first)] for _ in range(options.conversations)]
    order = list(KINDS)
    for number in range(options.rounds):
        for conversation, prompt in enumerate(prompts):
            order = order[1:] + order[:1]
            found = {}
            for kind in order:
                engines[kind].send((prompt, options.new))
                found[kind] = engines[kind].recv()
            answers = [tuple(found[kind]["tokens"]) for kind in KINDS]
            if number:
                possible += (len(prompt) - 1) // PAGE * PAGE
                tokens += len(prompt) + options.new
                equal += len(set(answers)) == 1
                for kind in KINDS:
                    times[kind].append(found[kind]["ttft"])
                    totals[kind] += found[kind]["total"]
                    stored[kind] += found[kind]["storage"]
                    ratios[kind].append(found["lmcache"]["ttft"] / found[kind]["ttft"])
            prompts[conversation] = (
                prompt + list(answers[0]) + [random.randrange(low, high) for _ in range(options.more)]
            )
        _tell(f"round {number + 1} of {options.rounds}")
    for kind in KINDS:
        engines[kind].send(None)
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
    asked = len(times["lmcache"])
    return {
        "model": options.model,
        "dtype": options.dtype,
        "requests": asked,
        "room_tokens": room,
        "ttft_s": {kind: _spread(values) for kind, values in times.items()},
        "ttft_ratio": {kind: median(values) for kind, values in ratios.items() if kind != "lmcache"},
        "linker_ttft_ratio": median(a / b for a, b in zip(times["linker"], times["recompute"], strict=True)),
        "tokens_per_s": {kind: tokens / totals[kind] for kind in KINDS},
        "from_storage": {kind: stored[kind] / possible for kind in KINDS},
        "answers_equal": f"{equal} of {asked}",
    }


def serve(pipe: Connection[Any, Any], kind: str, options: dict[str, Any], room: int, folder: str) -> None:
    """One engine in this process."""
    from lmcache_sglang import server_args
    from lmcache_sglang.testing import environment

    environment.enter()
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = folder
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers.io_struct import GenerateReqInput

    from lmcache_conformance.labs.models import MODELS, model_folder
    from lmcache_sglang.testing.session import HICACHE_ON_CPU, ON_CPU

    name = options["model"]
    storage: dict[str, Any] = {"enable_hierarchical_cache": True}
    if kind == "linker":
        storage = server_args(interface="linker", chunk_tokens=PAGE)
    elif kind == "lmcache":
        storage = server_args(disk_path=folder, prefetch_threshold=PAGE)
    elif kind == "file":
        storage |= {
            "hicache_storage_backend": "file",
            "hicache_storage_backend_extra_config": json.dumps({"prefetch_threshold": PAGE}),
        }
    engine = Engine(
        model_path=str(model_folder(name)) if name in MODELS else name,
        dtype=options["dtype"],
        page_size=PAGE,
        max_total_tokens=room,
        max_running_requests=2,
        skip_tokenizer_init=True,
        skip_server_warmup=True,
        grammar_backend="none",
        disable_overlap_schedule=True,
        sleep_on_idle=True,
        log_level="error",
        random_seed=0,
        **storage,
        **(ON_CPU if environment.on_cpu() else {}),
        **({} if kind == "linker" else HICACHE | (HICACHE_ON_CPU if environment.on_cpu() else {})),
    )

    found_in = "host" if kind == "linker" else "storage"  # SGLang's words for where pages came from

    async def ask(prompt: list[int], new: int) -> dict[str, Any]:
        request = GenerateReqInput(
            input_ids=prompt,
            sampling_params={"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True},
            stream=True,
        )
        began, first, tokens, last = time.perf_counter(), 0.0, [], {}
        async for last in engine.tokenizer_manager.generate_request(request, None):
            first = first or time.perf_counter() - began
            got = last["output_ids"]
            tokens = got if len(got) >= len(tokens) and got[: len(tokens)] == tokens else tokens + got
        details = last["meta_info"].get("cached_tokens_details") or {}
        total = time.perf_counter() - began
        return {"ttft": first, "total": total, "tokens": tokens, "storage": int(details.get(found_in, 0))}

    for _ in range(2):  # the first calls are slow
        engine.loop.run_until_complete(ask(list(range(3, 200)), 2))
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        pipe.send(engine.loop.run_until_complete(ask(*job)))
        time.sleep(0.3)  # what was computed is on its way to the storage
    engine.shutdown()


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

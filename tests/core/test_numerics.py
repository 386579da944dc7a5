"""Meaning covers every field but a reviewed list; rounding covers switches, environment variables and measured bits."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from lmcache.numerics import (
    NEUTRAL_CONFIG,
    depends_on_length,
    environment_switches,
    fixed_input,
    meaning_of,
    measured,
    torch_switches,
)
from lmcache.spec import host_isa

CONFIG: dict[Any, Any] = {"rope_theta": 1e4, "rope_scaling": {"factor": 2.0, "dtype": "x"}, "layers": [1, 2], 3: None}


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_theta": 1e4 + 1e-9},
        {"rope_theta": "10000.0"},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": {"factor": 2.0, "of_tomorrow": True}},
        {"layers": [2, 1]},
        {"layers": [1, [2]]},
        {3: False},
        {"a_field_of_tomorrow": None},
        {"odd": {1, 2}},
        {"odd": torch.float16},
    ],
)
def test_every_field_of_the_configuration_separates(changed: dict[Any, Any]) -> None:
    assert meaning_of(CONFIG | changed) != meaning_of(CONFIG)


def test_order_and_neutral_fields_do_not_separate() -> None:
    assert meaning_of(dict(reversed(CONFIG.items()))) == meaning_of(CONFIG)
    neutral = dict.fromkeys(NEUTRAL_CONFIG, "other")
    assert meaning_of(CONFIG | neutral | {"rope_scaling": {"factor": 2.0, **neutral}}) == meaning_of(CONFIG)
    assert all(NEUTRAL_CONFIG.values()), "each neutral field has a reason"


def test_an_alias_of_the_rope_type_does_not_separate_and_another_type_does() -> None:
    plain, alias, other = (
        {"rope": {"rope_type": "yarn"} | more} for more in ({}, {"type": "yarn"}, {"type": "linear"})
    )
    assert meaning_of(plain) == meaning_of(alias) != meaning_of(other)


def test_rope_whose_factors_depend_on_the_longest_sequence_is_recognised() -> None:
    assert depends_on_length({"text": {"rope_parameters": [{"rope_type": "longrope"}]}})
    assert depends_on_length({"rope_scaling": {"type": "su"}})
    assert not depends_on_length({"rope_parameters": {"rope_type": "yarn"}, "type": 3})


def test_what_else_decides_the_values_separates() -> None:
    assert meaning_of(CONFIG, scales=None) == meaning_of(CONFIG)
    assert len({meaning_of(CONFIG), meaning_of(CONFIG, scales="1"), meaning_of(CONFIG, other="1")}) == 3


def test_the_neutral_list_does_not_apply_to_what_else_decides_the_values() -> None:
    assert meaning_of({}, dtype="a") != meaning_of({}, dtype="b")


def test_environment_variables_that_choose_arithmetic_are_named() -> None:
    given = {
        "MKL_CBWR": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ONEDNN_VERBOSE": "1",
        "PATH": "/",
        "ONEDNN_OF_TOMORROW": "1",
    }
    want = (("MKL_CBWR", "AVX2"), ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ONEDNN_OF_TOMORROW", "1"))
    assert environment_switches(given) == want
    assert environment_switches({}) == ()


def test_the_instruction_set_of_the_host_includes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _ in environment_switches():  # engines set some when they load
        monkeypatch.delenv(name)
    plain = host_isa()
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    assert host_isa() == f"{plain} DNNL_DEFAULT_FPMATH_MODE=BF16"


SWITCHES = {
    "flash": "torch.backends.cuda.enable_flash_sdp(False)",
    "efficient": "torch.backends.cuda.enable_mem_efficient_sdp(False)",
    "math": "torch.backends.cuda.enable_math_sdp(False)",
    "mkldnn": "torch.backends.mkldnn.enabled = False",
    "mkldnn tf32": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "precision": "torch.set_float32_matmul_precision('high')",
    "new precision": "torch.backends.fp32_precision = 'tf32'",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "denormals": "torch.set_flush_denormal(True)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("new", [False, True])
def test_every_switch_of_torch_separates_and_none_raises(device: str, new: bool) -> None:
    """In processes of their own: old and new ways to set precision must not be mixed in one."""
    switches = {name: code for name, code in SWITCHES.items() if new == ("fp32_precision" in code)}
    if device == "cuda":
        switches = {name: code for name, code in switches.items() if "mkldnn" not in code and name != "threads"}
    code = (
        "import json, sys, torch\nfrom lmcache.numerics import torch_switches\n"
        "seen = torch_switches(sys.argv[1])\n"
        "for name, code in json.loads(sys.argv[2]).items():\n"
        "    exec(code)\n"
        "    now = torch_switches(sys.argv[1])\n"
        "    assert now != seen, name\n"
        "    seen = now\n"
    )
    command = [sys.executable, "-c", code, device, json.dumps(switches)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-500:]


def test_torch_at_its_defaults_has_few_switches() -> None:
    assert [name for name, _ in torch_switches("cpu") if name != "threads"] == []


def test_a_probe_whose_bits_change_is_left_out() -> None:
    value = fixed_input((3, 5), torch.bfloat16, "cpu")
    steady = measured(lambda: [value, value.float()])
    assert len(steady) == 32
    assert steady == measured(lambda: [value, value.float()]) != measured(lambda: [value + 1, value.float()])
    runs = iter([value, value + 1])
    assert measured(lambda: [next(runs)]) == ""


def test_fixed_inputs_leave_the_random_state_and_the_default_device_alone() -> None:
    state = torch.random.get_rng_state()
    try:
        torch.set_default_device("meta")
        value = fixed_input((4,), torch.float64, "cpu")
    finally:
        torch.set_default_device(None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert value.tolist() == [(2654435761 * n % 2**32) / 2**31 - 1 for n in range(1, 5)]

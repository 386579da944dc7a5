"""Compiles every kernel for every supported GPU ahead of time, without a GPU, and reports access widths, registers and spills.

The compiled specialisations are those that a launch would use: they are derived from the same addresses.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmcache_kernels import triton_convert
from lmcache_kernels.cases import CASES, CONVERTED, CONVERTED_FP32, Case
from lmcache_kernels.launch import Specialisation, specialise
from lmcache_kernels.quantise import FLOATS, LARGEST, conversion
from lmcache_kernels.triton_copy import COUNTS, KERNELS, constants

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100, B200, MI300."""

_DATA_LOAD = re.compile(r"ld\.global\.cg(?:\.v(\d))?\.b(\d+)")
_STORE = re.compile(r"st\.global(?:\.v(\d))?\.b(\d+)")
_AMD_DATA_LOAD = re.compile(r"(?:global|buffer)_load_(\w+) .*\bnt\b")
_AMD_STORE = re.compile(r"(?:global|buffer)_store_(\w+) ")
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2}


@dataclass(frozen=True)
class KernelReport:
    """Compilation result of one kernel for one GPU.

    Attributes:
        kernel: case and direction.
        target: compute capability or architecture.
        kind: "run" or "turn", see `Specialisation`; "convert", see `Conversion`.
        load_bytes, store_bytes: width of the narrowest load and store of the data, in bytes per thread and instruction.
        access_bytes: the smaller of the two.
        registers: per thread.
        spill_bytes: per thread; 0 if everything fits into registers.
        shared_bytes: shared memory per program.
        warps: per program.
        in_flight_bytes: bytes that one thread has in flight.
        occupancy: fraction of an SM's or CU's thread capacity, estimated from registers and shared memory.
    """

    kernel: str
    target: str
    kind: str
    load_bytes: int
    store_bytes: int
    access_bytes: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    in_flight_bytes: int
    occupancy: float


def report(targets: Sequence[str] = TARGETS, cases: Sequence[Case] = CASES) -> Iterator[KernelReport]:
    """Compiles every case in both directions for every target.

    Raises:
        ValueError: a target is not in `TARGETS`.
        RuntimeError: the installed Triton cannot compile for a target.
    """
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    for case in cases:
        what = specialise(case.copy())
        for into_a in (False, True):
            for target in targets:
                yield compiled(f"{case.name}, {_DIRECTION[into_a]}", what, target, into_a=into_a)
    for dtype, kind, into_a in product(FLOATS, LARGEST, (False, True)):
        for target in targets:
            yield converted(dtype, kind, target, into_a=into_a)


def verdicts(reports: Sequence[KernelReport], cases: Sequence[Case] = CASES) -> list[str]:
    """Returns one line per requirement of a case (access width, no spills) that a report fails; empty if all are met."""
    wanted = {case.name: case for case in cases}
    out = []
    for found in reports:
        case = wanted.get(found.kernel.rpartition(", ")[0], CONVERTED)
        wide = max(found.load_bytes, found.store_bytes)
        where = f"{found.kernel}, {found.target}"
        if wide < case.wide or found.access_bytes < case.narrow:
            out.append(
                f"{where}: loads of {found.load_bytes} and stores of {found.store_bytes} bytes, "
                f"must be {case.narrow} and {case.wide} or more"
            )
        if found.spill_bytes:
            out.append(f"{where}: spills {found.spill_bytes} bytes a thread")
    return out


def compiled(name: str, what: Specialisation, target: str, *, into_a: bool) -> KernelReport:
    """Compiles one copy kernel for one target."""
    lanes = _lanes(target)
    warps = what.warps(lanes)
    fixed = constants(what, into_a=into_a)
    arguments = {"tables": "*i64"} | dict.fromkeys(COUNTS, "i32")
    threads = warps * lanes
    options = {"num_warps": warps}
    return _compiled(
        name, target, what.kind, KERNELS[what.kind], arguments, fixed, options, what.bytes_at_a_time // threads
    )


def converted(dtype: torch.dtype, kind: torch.dtype, target: str, *, into_a: bool) -> KernelReport:
    """Compiles one conversion kernel for one target."""
    case = CONVERTED_FP32 if dtype == torch.float32 else CONVERTED
    lanes = _lanes(target)
    what = conversion(case.copy(), into_a=into_a, dtype=dtype, kind=kind, head_loop=1, lanes=lanes)
    arguments = {"tables": "*i64", "factors": "*fp32"} | dict.fromkeys(triton_convert.COUNTS, "i32")
    options = what.options()
    in_flight = what.rows * what.tile * dtype.itemsize // (options["num_warps"] * lanes)
    name = f"{str(dtype)[6:]} to {str(kind)[6:]}, {_DIRECTION[into_a]}"
    return _compiled(name, target, "convert", triton_convert.convert, arguments, what.constants(), options, in_flight)


_DIRECTION = {False: "out", True: "back"}


def _lanes(target: str) -> int:
    return 64 if target.startswith("gfx") else 32


def _compiled(
    name: str,
    target: str,
    kind: str,
    kernel: Any,
    arguments: dict[str, str],
    fixed: dict[str, Any],
    options: dict[str, Any],
    in_flight: int,
) -> KernelReport:
    amd = target.startswith("gfx")
    signature = arguments | dict.fromkeys(fixed, "constexpr")
    places = {(kernel.arg_names.index(key),): value for key, value in fixed.items()}
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton warns about its own defaults
            out = triton.compile(ASTSource(kernel, signature, places, {}), target=gpu, options=options)
    except Exception as error:
        raise RuntimeError(f"{name}: Triton {triton.__version__} cannot compile for {target}: {error}") from error
    shared, warps = int(out.metadata.shared), int(options["num_warps"])
    if amd:
        text = out.asm["amdgcn"]
        loads = [_AMD_BYTES.get(size, 1) for size in _AMD_DATA_LOAD.findall(text)]
        stores = [_AMD_BYTES.get(size, 1) for size in _AMD_STORE.findall(text)]
        registers = int(_one(r"\.vgpr_count:\s*(\d+)", text))
        spills = 4 * int(_one(r"\.vgpr_spill_count:\s*(\d+)", text)) + int(
            _one(r"\.private_segment_fixed_size: (\d+)", text)
        )
        occupancy = _amd_occupancy(registers, shared, warps)
    else:
        text = out.asm["ptx"]
        loads = [int(count or 1) * int(bits) // 8 for count, bits in _DATA_LOAD.findall(text)]
        stores = [int(count or 1) * int(bits) // 8 for count, bits in _STORE.findall(text)]
        registers, spills = _assembled(text, target)
        occupancy = _nvidia_occupancy(target, registers, shared, warps)
    return KernelReport(
        kernel=name,
        target=target,
        kind=kind,
        load_bytes=min(loads),
        store_bytes=min(stores),
        access_bytes=min(*loads, *stores),
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        warps=warps,
        in_flight_bytes=in_flight,
        occupancy=round(occupancy, 3),
    )


def narrowed(what: Specialisation) -> Specialisation:
    """The same kernel without its alignment guarantee; tests use it to check that `verdicts` finds narrow accesses."""
    return replace(what, align=what.width)


def _assembled(ptx: str, target: str) -> tuple[int, int]:
    """(registers, bytes spilled) per thread, as reported by ptxas."""
    knobs: Any = triton.knobs
    tool = knobs.nvidia.ptxas if int(target[3:]) < 90 else knobs.nvidia.ptxas_blackwell
    architecture = _one(r"\.target (sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [tool.path, "-v", f"--gpu-name={architecture}", str(source), "-o", str(Path(folder, "out"))],
            capture_output=True,
            text=True,
            check=True,
        )
    output = done.stderr + done.stdout
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", output)
    return int(_one(r"Used (\d+) registers", output)), max(map(int, spilled), default=0)


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no match for {pattern!r}")
    return found[1]


def _nvidia_occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Limits per SM: 65,536 registers, 64 warps, 32 programs, and its shared memory."""
    memory = {"sm_80": 164 << 10}.get(target, 228 << 10)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    programs = min(32, 64 // warps, by_registers, memory // (shared + 1024))
    return programs * warps / 64


def _amd_occupancy(registers: int, shared: int, warps: int) -> float:
    """Limits per CU: 512 registers and 8 waves on each of 4 SIMDs, 64 KiB of shared memory."""
    waves = min(8, 512 // max(1, -(-registers // 8) * 8)) * 4
    programs = min(waves // warps, (64 << 10) // shared if shared else waves)
    return programs * warps / 32

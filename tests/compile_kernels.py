"""Compiles the Triton kernels without a GPU, for tests/test_compile.py: one JSON list on stdout, a row for each kernel.

    python tests/compile_kernels.py quick       # a choice of cases
    python tests/compile_kernels.py wide        # all others
    python tests/compile_kernels.py spilling    # a configuration that is known to spill

A case calls a launch function of the package with tensors on the CPU, and Triton is told that its device is an sm_90 or
an sm_80; its JIT then compiles and does not launch. So every signature, constant, num_warps and divisibility is what a
launch with such tensors makes of it, and nothing is compiled that no launch reaches. Only the splits are given: they
depend on the GPU's number of processors.

A row: kernel, arch, mode, dtype (of the inputs), what (the case that first needed this kernel), config ([TILE, DEPTH,
num_warps, num_stages], null for what the launch does not name), registers, spill_stores, spill_loads and stack (bytes;
these four by ptxas -v), shared (bytes), instructions (how many multiplications of each kind are in the machine code;
"TF32" are those on tensor cores, counted before, that have TF32 operands).

To add a kernel: a function like `nearest_cases`, and its name in CASES.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.bn_stats import launch as launch_bn_stats
from kernels.bn_stats import launch_backward as launch_bn_stats_backward
from kernels.gram import Config
from kernels.gram import launch as launch_gram
from kernels.nearest import LARGE
from kernels.nearest import launch as launch_nearest
from kernels.solve import launch_factor, launch_pack, launch_solve, record_failure

ARCHS = (90, 80)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """A call of a launch function, and the mode by which its kernels should multiply, with inputs of this dtype."""

    quick: bool
    mode: str
    dtype: torch.dtype
    what: str
    launch: Callable[[], object]


# --------------------------------------------------------------------------------------------------------------- cases
# What matters of a size or stride is whether it is divisible by 16 and whether it is 1; and of d, whether it fills the
# last DEPTH. 49 rows with an odd stride make an odd stride of the batch, too.

LAYOUTS = {  # columns, strides of the rows of f_s and of f_t, entries by which both begin after an aligned address
    "even, aligned": (1024, 1024, 1024, 0),
    "even, unaligned": (1024, 1025, 1025, 0),
    "even, f_s unaligned": (1024, 1025, 1024, 0),
    "even, f_t unaligned": (1024, 1024, 1025, 0),
    "even, shifted": (1024, 1040, 1040, 1),
    "16 over, aligned": (1040, 1040, 1040, 0),  # not EVEN where DEPTH is above 16; no other sum of native is aligned
    "odd, aligned": (1025, 1040, 1040, 0),
    "odd, unaligned": (1025, 1025, 1025, 0),
}


def rows(n: int, d: int, stride: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """(n, d) with this stride, beginning `shift` entries after an aligned address."""
    return torch.empty(n, stride, dtype=dtype)[:, shift : shift + d]


def batch(n: int, d: int, row: int, step: int, dtype: torch.dtype) -> Tensor:
    """(2, n, d) with these strides of rows and of the batch."""
    return torch.empty(step + n * row, dtype=dtype).as_strided((2, n, d), (step, row, 1))


def gram_cases() -> Iterator[Case]:
    quick = [  # SYMMETRIC, SPLIT, layout
        (True, 1, "even, aligned"),
        (True, 4, "even, f_t unaligned"),
        (False, 1, "odd, aligned"),
    ]
    every = list(product((True, False), (1, 4), LAYOUTS))
    for mode, dtype, choices, in_quick in [
        ("fp64", F64, every, quick),
        ("fp64", F32, every, quick),
        ("tf32x3", F32, every, quick),
        ("native", BF16, every, quick),
        ("native", F16, quick, quick[:1]),  # as bfloat16, but for the type of the loads and products
        ("ieee", F32, every, quick),
        ("ieee", BF16, every, quick[:1]),
        ("ieee", F16, quick, quick[:1]),
    ]:
        for choice in choices:
            symmetric, split, layout = choice
            d, s_row, t_row, shift = LAYOUTS[layout]
            f_s, f_t = rows(49, d, s_row, dtype, shift), rows(49, d, t_row, dtype, shift)
            call = partial(launch_gram, f_s, f_t, symmetric=symmetric, mode=mode, split=split)
            what = f"{'symmetric, ' * symmetric}split {split}, {layout}"
            yield Case(choice in in_quick, mode, dtype, what, call)


def solve_cases() -> Iterator[Case]:
    """Of the factor, the packing, the solve and the record."""
    for mode, dtype in (("fp64", F64), ("fp32", F32)):
        for m, row_odd, step_odd in product((48, 50), (0, 1), (0, 1)):  # of m = 1 no product is left
            k = batch(m, m, 64 + row_odd, 4096 + step_odd, dtype)
            quick = (m, row_odd, step_odd) in [(48, 0, 0), (50, 1, 1)]
            what = f"m {m}, strides {tuple(k.stride())}"
            yield Case(quick, mode, dtype, what, partial(launch_factor, k, k.new_ones(2)))
        for m in (48, 50, 256, 1):  # 256: the number of blocks is divisible by 16, too; 1: it is 1
            yield Case(m == 50, mode, dtype, f"m {m}", partial(launch_pack, torch.empty(2, m, m, dtype=dtype)))
        # c = 10 has one strip of columns, 48 has three, 250 has 16
        for m, c, row_odd, step_odd in product((48, 50, 1), (48, 10, 250, 1), (0, 1), (0, 1)):
            b = batch(m, c, 256 + row_odd, 16384 + step_odd, dtype)
            quick = (m, c, row_odd, step_odd) in [(48, 48, 0, 0), (50, 10, 1, 1)]
            what = f"m {m}, c {c}, strides {tuple(b.stride())}"
            yield Case(quick, mode, dtype, what, partial(launch_solve, torch.empty(2, m, m, dtype=dtype), b))
        info, lam = torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=dtype)
        call = partial(record_failure, info, lam, "krr_predict", 2, 2, 2, by_kernel=True)
        yield Case(True, mode, dtype, "of two matrices", call)


def nearest_cases() -> Iterator[Case]:
    for mode, dtype, n, quick in [
        ("fp64", F64, 49, "odd, unaligned"),
        ("tf32x3", F32, 49, "odd, unaligned"),
        ("native", BF16, 49, "odd, unaligned"),
        ("native", BF16, LARGE, "even, aligned"),
        ("native", F16, 49, ""),
        ("native", F16, LARGE, ""),
    ]:
        for layout, (d, stride, t_stride, shift) in LAYOUTS.items():
            if stride == t_stride:  # there is no f_t
                call = partial(launch_nearest, rows(n, d, stride, dtype, shift), split=4)
                yield Case(layout == quick, mode, dtype, f"n {n}, {layout}", call)


def bn_stats_cases() -> Iterator[Case]:
    """Forward and backward; 2048 and 2000 channels are many for the one program that adds them up."""
    shapes = [(64, 16, 16), (50, 7, 7), (2048, 4, 4), (2000, 1, 1), (3, 32, 32)]  # divisible by 16, and not
    layouts = (torch.channels_last, torch.contiguous_format)
    for dtype, shape, layout, affine in product((F64, F32, BF16, F16), shapes, layouts, (True, False)):
        work = F64 if dtype == F64 else F32
        x = torch.empty(4, *shape, dtype=dtype).to(memory_format=layout)
        vectors = [torch.ones(shape[0], dtype=work) for _ in range(4)]
        weight, bias, mean, var = vectors if affine else (None, None, *vectors[2:])
        by_group = torch.ones(2, dtype=work), torch.ones(2, shape[0], dtype=work), torch.ones(2, shape[0], dtype=work)

        def call(x=x, weight=weight, bias=bias, mean=mean, var=var, by_group=by_group):
            launch_bn_stats(x, weight, bias, mean, var, 1e-5, 2, split=2)
            d_term, offset, slope = by_group
            launch_bn_stats_backward(x, d_term, x, weight, mean, var, offset, slope, 1e-5)

        quick = affine and shape in shapes[:3] and dtype != F16
        what = f"{shape}, {str(layout).removeprefix('torch.')}{'' if affine else ', not affine'}"
        yield Case(quick, "fp64" if dtype == F64 else "fp32", dtype, what, call)


def spilling_cases() -> Iterator[Case]:
    """Four times the sums for the same threads."""
    x = rows(49, 1024, 1024, F64)
    call = partial(launch_gram, x, x, symmetric=True, mode="fp64", split=1, config=Config(128, 16, 4, 3))
    yield Case(True, "fp64", F64, "tiles of 128 by 4 warps", call)


CASES = (gram_cases, solve_cases, nearest_cases, bn_stats_cases)


# ------------------------------------------------------------------------------------------------------------- compile


def pretend(arch: int) -> None:
    """Tells Triton that its device is an sm_{arch}. Its JIT keeps kernels by the number of the device: that is arch."""
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(device)


def compiled(case: Case, arch: int, seen: set[str]) -> Iterator[dict]:
    """The rows of the kernels of this case that are not among the seen ones."""
    pretend(arch)
    found = []
    run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):  # Triton prints what ptxas said
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        found.append((function.__name__, kernel, kwargs, log.getvalue()))
        return kernel

    with mock.patch.object(JITFunction, "run", compile_only):
        case.launch()
    for name, kernel, kwargs, log in found:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            yield dict(
                kernel=name,
                arch=arch,
                mode=case.mode,
                dtype=str(case.dtype).removeprefix("torch."),
                what=case.what,
                config=[kwargs.get(key) for key in ("TILE", "DEPTH", "num_warps", "num_stages")],
                registers=number(r"Used (\d+) registers", log),
                spill_stores=number(r"(\d+) bytes spill stores", log),
                spill_loads=number(r"(\d+) bytes spill loads", log),
                stack=number(r"(\d+) bytes stack frame", log),
                shared=kernel.metadata.shared,
                instructions=multiplications(kernel.asm["cubin"]),
            )


def number(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    if len(found) != 1:
        raise ValueError(f"{pattern!r} is there {len(found)} times, and not once, in the report of ptxas:\n{log}")
    return int(found[0])


def multiplications(cubin: bytes) -> dict[str, int]:
    """How many instructions of each kind multiply, and (TF32) how many of those on tensor cores have TF32 operands."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]  # -ndf: half the time, the same code
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # "        /*0a10*/   @!P0 HMMA.1688.F32.TF32 R4, R8, R12, R4 ;"
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    counts = Counter(name.split(".")[0] for name in names)
    counts = {name: n for name, n in counts.items() if name.endswith("MMA") or name in ("FFMA", "DFMA")}
    return counts | {"TF32": sum("TF32" in name.split(".") for name in names)}


def main(which: str) -> None:
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile")
    triton.knobs.nvidia.dump_ptxas_log = True
    families = (spilling_cases,) if which == "spilling" else CASES
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache  # what was compiled before has no report of ptxas
        report, seen = [], set()
        for family, arch in product(families, ARCHS):
            for case in family():
                if case.quick == (which != "wide"):
                    report += compiled(case, arch, seen)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    if sys.argv[1:] not in (["quick"], ["wide"], ["spilling"]):
        sys.exit("usage: python tests/compile_kernels.py quick|wide|spilling")
    main(sys.argv[1])

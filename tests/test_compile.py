"""What the compiler makes of every Triton kernel for an H100 and an A100, neither of which need be here.

compile_kernels.py compiles them in a process of its own, as Triton is interpreted in this one. The numbers are those of
the Triton that requirements.txt names: where another one makes a kernel spill, its configuration has to change.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels.backend import DTYPES
from kernels.gram import mode_of

triton = pytest.importorskip("triton")  # on Linux only
pytestmark = pytest.mark.slow  # a minute of compiling

REPO = Path(__file__).resolve().parent.parent
ARCHS = {90: "sm_90a", 80: "sm_80"}
MAX_REGISTERS = 255  # of a thread: the instructions have no room for more
MAX_SHARED = 99 * 1024  # bytes of a block on GPUs of 8.6, 8.9 and 12.0; those of 8.0 and 9.0 have more
TENSOR_CORES = {  # what multiplies in a mode; in those that are not here it is FFMA
    "fp64": {90: "DMMA", 80: "DMMA"},
    "tf32x3": {90: "HGMMA", 80: "HMMA"},
    "native": {90: "HGMMA", 80: "HMMA"},
}
NO_PRODUCTS = {
    "_finalize_kernel", "_inverse_norm_kernel", "_merge_kernel", "_pack_kernel", "_record_kernel",
    "_bn_stats_kernel", "_bn_stats_term_kernel", "_bn_stats_backward_kernel",
}  # fmt: skip


def missing() -> str:
    """Why nothing can be compiled here; empty where it can."""
    if "nvidia" not in triton.backends.backends:
        return "this Triton has no backend for NVIDIA GPUs"
    try:
        ptxas, _ = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        return f"Triton: {error}"
    known = subprocess.run([ptxas, "--help"], capture_output=True, text=True, timeout=60).stdout
    unknown = [name for name in ARCHS.values() if f"'{name}'" not in known]
    return f"Triton's ptxas knows no {', '.join(unknown)}" if unknown else ""


def compiled(which: str) -> list[dict]:
    """The rows of compile_kernels.py, by a process without the interpreter and other settings of Triton."""
    if reason := missing():
        pytest.skip(reason)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PTXAS_", "DISABLE_PTXAS"))}
    limit = {"quick": 600, "spilling": 120, "wide": 3600}[which]  # seconds: ten times what an idle core needs, or more
    done = subprocess.run(
        [sys.executable, "tests/compile_kernels.py", which],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quick():
    return compiled("quick")


@pytest.fixture(scope="module", params=["quick", "wide"])
def rows(request):
    return request.getfixturevalue("quick") if request.param == "quick" else compiled("wide")


def show(rows: list[dict]) -> str:
    return "\n" + "\n".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows)


def modules():
    # not attributes of the package: it exports functions with the names of some modules
    return [importlib.import_module(f"kernels.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)]


def jit_functions() -> dict:
    """The jit functions of the package, as the Python functions that they were, by name."""
    found = {}
    for module in modules():
        for value in vars(module).values():
            if isinstance(value, triton.runtime.jit.KernelInterface):
                name = value.fn.__name__
                assert found.setdefault(name, value.fn) is value.fn, f"two kernels have the name {name}"
    return found


def configurations() -> set[tuple]:
    """(module, configuration) of every Config at the top of a module, or in a dict there."""
    found = set()
    for module in modules():
        for value in vars(module).values():
            several = value.values() if isinstance(value, dict) else [value]
            found |= {(module.__name__, tuple(v)) for v in several if type(v).__name__ == "Config"}
    return found


# ---------------------------------------------------------------------------------------------------- what is compiled


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(quick, arch):
    """Or called by one that is. A new kernel needs a case in compile_kernels.py."""
    functions = jit_functions()
    reached, new = set(), {row["kernel"] for row in quick if row["arch"] == arch}
    while new:
        reached |= new
        new = {name for f in new for name in functions[f].__code__.co_names if name in functions} - reached
    assert reached == set(functions)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration_is_compiled(quick, arch):
    shipped, functions = configurations(), jit_functions()
    assert len(shipped) > 3  # else they are no longer found
    assert shipped <= {(functions[r["kernel"]].__module__, tuple(r["config"])) for r in quick if r["arch"] == arch}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_mode_is_compiled_with_every_dtype(quick, arch):
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    wanted = {(mode_of(p, dtype), name) for p in ("fp32", "ieee") for dtype, name in names.items() if name != "float64"}
    wanted |= {("fp64", "float64"), ("fp64", "float32")}  # to which `launch` casts half inputs
    found = {(row["mode"], row["dtype"]) for row in quick if row["kernel"] == "_gram_kernel" and row["arch"] == arch}
    assert found == wanted


# --------------------------------------------------------------------------------------------------- what comes of it


def spilling(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["spill_stores"] or row["spill_loads"]]


def test_nothing_spills(rows):
    assert not spilling(rows), show(spilling(rows))


def test_a_kernel_made_to_spill_is_reported():
    rows = compiled("spilling")
    assert {row["arch"] for row in rows} == set(ARCHS)
    assert spilling(rows) == rows


def test_registers_and_shared_memory_fit(rows):
    large = [row for row in rows if not 0 < row["registers"] <= MAX_REGISTERS or row["shared"] > MAX_SHARED]
    assert not large, show(large)


def test_products_are_those_of_the_mode(rows):
    """float32 and float64 never meet a tensor core of lower precision, and each mode uses the one that it is for."""
    wrong = []
    for row in rows:
        expected = TENSOR_CORES.get(row["mode"], {}).get(row["arch"], "FFMA")
        has = row["instructions"]
        on_tensor_cores = {name for name in has if name.endswith("MMA")}
        if row["kernel"] in NO_PRODUCTS:
            good = on_tensor_cores == set()
        else:
            good = has.get(expected, 0) > 0 and on_tensor_cores == {expected} - {"FFMA"}
        if not good:
            wrong.append(row)
    assert not wrong, show(wrong)


def test_tf32_is_threefold_or_not_at_all(rows):
    """On sm_80 all three products have instructions of one shape: without the other two there is a power of two."""
    wrong = []
    for row in rows:
        has = row["instructions"]
        if row["mode"] != "tf32x3" or row["kernel"] in NO_PRODUCTS:
            good = has["TF32"] == 0
        elif row["arch"] == 80:
            good = has["TF32"] == has["HMMA"] and has["TF32"] % 3 == 0
        else:
            good = has["TF32"] == has["HGMMA"]
        if not good:
            wrong.append(row)
    assert not wrong, show(wrong)

"""Compiling graphs with AOTInductor, for a set of CPU instructions that is known.

1. The same source gives the same code: nothing is chosen by timing, and one thread computes a kernel.
2. `features` are all that the compiled code may use, as asked of the compiler with the options that it compiles with.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import config, cpp_builder, cpu_vec_isa
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

from ganglion._errors import Error


class _Avx2(cpu_vec_isa.VecAVX2):
    def __bool__(self) -> bool:
        return True


class _Avx512(cpu_vec_isa.VecAVX512):
    # The base class also uses bfloat16 where this machine has it, which the level does not include.
    def __bool__(self) -> bool:
        return True


LEVELS: dict[str, cpu_vec_isa.VecISA] = {"x86-64-v3": _Avx2(), "x86-64-v4": _Avx512()}
"""Levels of x86-64 (psABI) and Inductor's vectors for each."""

# Macros that compilers define for instruction sets, and the names in /proc/cpuinfo.
_MACROS = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "SSE4_1": "sse4_1",
    "SSE4_2": "sse4_2",
    "SSE4A": "sse4a",
    "POPCNT": "popcnt",
    "LZCNT": "abm",
    "MOVBE": "movbe",
    "AES": "aes",
    "PCLMUL": "pclmulqdq",
    "SHA": "sha_ni",
    "GFNI": "gfni",
    "VAES": "vaes",
    "VPCLMULQDQ": "vpclmulqdq",
    "ADX": "adx",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVXVNNI": "avx_vnni",
    "FMA": "fma",
    "F16C": "f16c",
    "BMI": "bmi1",
    "BMI2": "bmi2",
    "AVX512F": "avx512f",
    "AVX512BW": "avx512bw",
    "AVX512CD": "avx512cd",
    "AVX512DQ": "avx512dq",
    "AVX512VL": "avx512vl",
    "AVX512IFMA": "avx512ifma",
    "AVX512VBMI": "avx512vbmi",
    "AVX512VBMI2": "avx512_vbmi2",
    "AVX512VNNI": "avx512_vnni",
    "AVX512BITALG": "avx512_bitalg",
    "AVX512VPOPCNTDQ": "avx512_vpopcntdq",
    "AVX512BF16": "avx512_bf16",
    "AVX512FP16": "avx512_fp16",
    "AVX512VP2INTERSECT": "avx512_vp2intersect",
    "AMX_TILE": "amx_tile",
    "AMX_BF16": "amx_bf16",
    "AMX_INT8": "amx_int8",
    "AMX_FP16": "amx_fp16",
}

_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    # The program that loads a package has libtorch; linking to it would ask for CUDA's libraries too.
    "aot_inductor.link_libtorch": False,
    "cpp.threads": 1,
    "deterministic": True,
    "max_autotune": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "benchmark_kernel": False,
    "benchmark_fusion": False,
}


def choose(cpu: str) -> str:
    """Resolves "auto" to the highest level of this machine.

    Raises:
        Error: `cpu` is unknown.
    """
    if platform.machine() != "x86_64":
        if cpu not in ("auto", "native"):
            raise Error(f"cpu={cpu!r} is for x86-64, and this machine is {platform.machine()}: leave it out")
        return "native"
    if cpu == "auto":
        return "x86-64-v4" if torch.cpu._is_avx512_supported() else "x86-64-v3"
    if cpu not in (*LEVELS, "native"):
        raise Error(f"cpu={cpu!r}; it is 'auto', 'native', {', '.join(map(repr, LEVELS))}")
    return cpu


@contextlib.contextmanager
def target(cpu: str) -> Iterator[None]:
    """Lets Inductor compile for a level; "native" leaves it as it is: for all that this machine has."""
    if cpu == "native":
        yield
        return
    flags = cpp_builder._get_optimization_cflags

    def for_level(*arguments: Any, **options: Any) -> tuple[list[str], list[str]]:
        compile_flags, link_flags = flags(*arguments, **options)
        return [f"march={cpu}" if flag == "march=native" else flag for flag in compile_flags], link_flags

    with (
        mock.patch.object(cpp_builder, "_get_optimization_cflags", for_level),
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: [LEVELS[cpu]]),
        config.patch({"cpp.vec_isa_ok": True}),
    ):
        yield


def features(cpu: str) -> list[str]:
    """Instruction sets that code for `cpu` may use, by their names in /proc/cpuinfo."""
    if platform.machine() != "x86_64":
        with open("/proc/cpuinfo", encoding="ascii") as file:
            named = next((line for line in file if line.startswith("Features")), ":")
        return sorted(named.partition(":")[2].split())
    with target(cpu):
        vectors = cpu_vec_isa.pick_vec_isa().build_arch_flags().split()
    try:
        compiler = cpp_builder.get_cpp_compiler()
        command = [compiler, f"-march={cpu}", *vectors, "-dM", "-E", "-x", "c++", "/dev/null"]
        defined = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[:1]
        raise Error(
            f"{compiler} does not compile for {cpu}: install g++ 11 or later, or name another in CXX; {said}"
        ) from None
    except (RuntimeError, OSError):
        raise Error("compiling a package needs a C++ compiler: install g++ 11 or later, or name one in CXX") from None
    return sorted(known for macro, known in _MACROS.items() if f"__{macro}__" in defined)


def missing_features(wanted: list[str]) -> list[str]:
    """Instruction sets of these that this machine has not."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return sorted(set(wanted) - set(line.partition(":")[2].split()))


def compile_graph(module: fx.GraphModule, examples: list[Tensor], cpu: str) -> list[str]:
    """Compiles a graph; returns the files that a package takes."""
    # Its cache of declarations goes by addresses in memory, so it hits by chance.
    declare = mock.patch.object(CppWrapperCpu, "codegen_int_array_var", _declare_array)
    with target(cpu), declare, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(_Flat(module), tuple(examples), strict=False)
        files = torch._inductor.aot_compile(exported.module(), tuple(examples), options=_OPTIONS)
    return [str(file) for file in files]


def without_sources(files: list[str], folder: Path) -> list[str]:
    """Files that a loader needs. It goes by the name of the source, whose text names folders of this machine."""
    kept = [file for file in files if not file.endswith((".cpp", ".kernel_metadata.json"))]
    for file in files:
        if file.endswith(".wrapper.cpp"):
            empty = folder / Path(file).name
            empty.write_text("")
            kept.append(str(empty))
    return kept


def _declare_array(self: Any, values: str, writeline: Any, known_statically: bool = False, graph: Any = None) -> str:
    return self._codegen_int_array_var_impl(values, writeline, known_statically)


class _Flat(torch.nn.Module):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.captured = graph

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return self.captured(*tensors)

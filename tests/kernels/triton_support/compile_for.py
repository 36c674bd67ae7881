"""Compile a Triton kernel for a GPU that is not there, and read what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Usage:
    """Registers of one thread (vector registers on AMD), bytes spilt, and bytes of shared memory of one block."""

    registers: int
    spilt: int
    shared: int


def compile_for(
    fn: Any, signature: dict[str, str], constants: dict[str, Any], family: str, warps: int, stages: int
) -> Any:
    """Compile ``fn`` for "sm_80", "sm_90" or "gfx942".

    signature: type of every run-time argument ("*bf16", "i32", ...); pointers are taken to be 16-byte aligned, as
    torch allocates them, and integers to be anything, as the kernels declare them.
    """
    types = {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if types[name].startswith("*")}
    source = ASTSource(fn=fn, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(family[3:]), 32) if family.startswith("sm_") else GPUTarget("hip", family, 64)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def usage(compiled: Any) -> Usage:
    """What the machine code of ``compiled`` uses, read from the assembler's own report."""
    if compiled.metadata.target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            return int(found.group(1)) if found else 0

        # A lane has 512 registers, of which 256 can be addressed as vector registers and the rest hold accumulators.
        return Usage(field("vgpr_count") - field("agpr_count"), 4 * field("vgpr_spill_count"), compiled.metadata.shared)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources: {report[-200:]}")
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local, compiled.metadata.shared)

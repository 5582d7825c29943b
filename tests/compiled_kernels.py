"""Compiles the Triton kernels of the selective scan as a GPU would, on a machine without one.

python tests/compiled_kernels.py CAPABILITY     (90 is an H100)

The compiler, with the assembler that ships with Triton, needs a device only to learn its kind and to load
what it made. Here the kind is given, and kernels are compiled where they would be launched: with the
arguments, types and alignments of real calls. Prints one line of JSON for each kernel. Needs
TRITON_INTERPRET=0.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from findrec.ops.scan._scan_triton import triton_scan

# Shape [B, L, D, N], type, and whether with D, z, initial and last state. Sizes of 1 become constants.
CALLS = [
    ((2, 40, 48, 16), torch.float32, False),
    ((2, 40, 48, 16), torch.bfloat16, True),
    ((1, 1, 1, 1), torch.float32, True),
]


class NoDevice:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead_of_launching(compiled: list) -> None:
    def launcher(kernel, grid):
        return lambda *args, **options: compiled.append(
            (kernel.__name__, kernel.warmup(*args, grid=grid, **options))
        )

    JITFunction.__getitem__ = launcher


def call(shape, dtype, full):
    rows, length, channels, states = shape

    def ones(*size, dtype=torch.float32):
        return torch.ones(size, dtype=dtype, requires_grad=True)

    u, z = (ones(rows, length, channels, dtype=dtype) for _ in range(2))
    B, C = ones(rows, length, 2 * states, dtype=dtype).chunk(2, dim=-1)
    delta, A, D = ones(rows, length, channels), ones(channels, states), ones(channels)
    first = ones(rows, channels, states)
    options = (D, z, first) if full else (None, None, None)
    y, last = triton_scan(u, delta, A, B, C, *options, want_last=full)
    (y.sum() + last.sum() if full else y.sum()).backward()


def stack_bytes(machine_code: bytes) -> int:
    """Bytes of a thread that do not fit into registers, by the tool that ships with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


def main(capability: int) -> None:
    triton.runtime.driver.set_active(NoDevice(capability))
    compiled: list = []
    compile_instead_of_launching(compiled)
    for shape, dtype, full in CALLS:
        compiled.clear()
        call(shape, dtype, full)
        for name, kernel in compiled:
            row = {
                "kernel": name,
                "dtype": str(dtype).removeprefix("torch."),
                "machine_code": len(kernel.asm["cubin"]),
                "target": next(x for x in kernel.asm["ptx"].splitlines() if x.startswith(".target")),
                "stack": stack_bytes(kernel.asm["cubin"]),
                "atomic": "atomic" in kernel.asm["ttgir"],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

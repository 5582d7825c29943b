"""Compiles the Triton kernels of the selective scan as a GPU would, and runs what was made in `ptx_machine`.

python tests/compiled_kernels.py CAPABILITY     (90 is an H100)

The compiler, with the assembler that ships with Triton, needs a device only to learn its kind and to load
what it made. Here the kind is given, and kernels are compiled where they would be launched: with the
arguments, types and alignments of real calls. Prints a line of JSON for each forward and backward pass: how
far results are from the plain loop in float64, and facts about the kernels. Needs TRITON_INTERPRET=0.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import ptx_machine
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from findrec.ops.scan._scan_triton import triton_scan
from findrec.ops.scan.selective_scan import selective_scan

# Shape [B, L, D, N], type, and whether with D, z, initial and last state. Sizes of 1 become constants.
CALLS = [
    ((2, 40, 36, 16), torch.float32, True),
    ((1, 33, 20, 16), torch.bfloat16, True),
    ((2, 17, 10, 5), torch.float32, False),
    ((1, 20, 3, 1), torch.float32, True),
    ((1, 1, 1, 1), torch.float32, False),
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


def run_in_the_machine(compiled: list) -> None:
    """Launches compile, note what came out, and run that."""

    def launcher(kernel, grid):
        def launch(*args, **options):
            made = kernel.warmup(*args, grid=grid, **options)
            compiled.append((kernel.__name__, made))
            # None, and 1 where the kernel is specialised for it, are no parameters of what was compiled.
            general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
            given = [
                x
                for name, x in zip(kernel.arg_names[: len(args)], args, strict=True)
                if x is not None and (isinstance(x, Tensor) or x != 1 or name in general)
            ]
            ptx_machine.run(made.asm["ptx"], given, grid, made.metadata.shared)

        return launch

    JITFunction.__getitem__ = launcher


def make_inputs(shape, dtype, full) -> dict[str, Tensor]:
    rows, length, channels, states = shape
    torch.manual_seed(0)
    both = torch.randn(rows, length, 2 * channels).to(dtype)
    mixed = torch.randn(rows, length, 2 * states).to(dtype)
    u, z = both.chunk(2, dim=-1)
    B, C = mixed.chunk(2, dim=-1)
    delta = torch.nn.functional.softplus(torch.randn(rows, length, channels) - 2)
    inputs = {"u": u, "delta": delta, "A": -8 * torch.rand(channels, states), "B": B, "C": C}
    if full:
        first = torch.randn(rows, channels, states)
        inputs |= {"D": torch.randn(channels), "z": z, "initial_state": first}
    return inputs


def outcome(scan, inputs: dict[str, Tensor], full: bool) -> dict[str, Tensor]:
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, last = scan(inputs)
    loss = (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
    if full:
        loss = loss + last.square().sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y.detach(), "last": last.detach()} | {
        f"d{name}": x for name, x in zip(inputs, grads, strict=True)
    }


def ours(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    optional = {name: inputs.get(name) for name in ("D", "z", "initial_state")}
    return triton_scan(**(inputs | optional), want_last=True)


def plain_loop(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, return_last_state=True, impl="reference")


def stack_bytes(machine_code: bytes) -> int:
    """Bytes of a thread that do not fit into registers, by the tool that ships with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


def describe(name: str, kernel) -> dict:
    return {
        "kernel": name,
        "target": next(x for x in kernel.asm["ptx"].splitlines() if x.startswith(".target")),
        "stack": stack_bytes(kernel.asm["cubin"]),
        "atomic": "atomic" in kernel.asm["ttgir"],
    }


def main(capability: int) -> None:
    triton.runtime.driver.set_active(NoDevice(capability))
    compiled: list = []
    run_in_the_machine(compiled)
    for shape, dtype, full in CALLS:
        compiled.clear()
        inputs = make_inputs(shape, dtype, full)
        actual = outcome(ours, inputs, full)
        expected = outcome(plain_loop, {name: x.double() for name, x in inputs.items()}, full)
        errors = {}
        for name, wanted in expected.items():
            scale = wanted.abs().max().clamp(min=1.0)
            errors[name] = float((actual[name].double() - wanted).abs().max() / scale)
        kernels = [describe(*each) for each in compiled]
        row = {"dtype": str(dtype).removeprefix("torch."), "errors": errors, "kernels": kernels}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

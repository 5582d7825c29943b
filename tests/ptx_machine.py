"""Runs the PTX of a Triton kernel with numpy, all threads of a block in step: a GPU where there is none.

It knows the instructions that the scan's kernels are compiled to and refuses others. All threads of a block
must take the same branches. Memory is one array for each kernel call, with gaps between the tensors; an
access outside of them is an error. The meaning of the instructions is that of the PTX ISA, version 8.7.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

import numpy as np
import torch

GAP = 1 << 12  # bytes around each tensor
LANES = 32  # threads of a warp
UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
COMPARE = {x: getattr(operator, x) for x in ("eq", "ne", "lt", "le", "gt", "ge")}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class Memory:
    """Bytes by address; `tensors` are copied in, and back by `read_back`."""

    def __init__(self, size: int, tensors: Sequence[torch.Tensor] = ()):
        self.bytes = np.zeros(size, np.uint8)
        self.usable = np.zeros(size, bool)
        self.tensors, self.addresses = list(tensors), []
        end = GAP
        for x in tensors:
            self.addresses.append(end)
            self.usable[end : end + _span(x)] = True
            self.bytes[end : end + _span(x)] = _bytes(x)
            end += -(-_span(x) // GAP) * GAP + GAP

    def read_back(self) -> None:
        for x, address in zip(self.tensors, self.addresses, strict=True):
            _bytes(x)[:] = self.bytes[address : address + _span(x)]

    def load(self, address: np.ndarray, bits: int) -> np.ndarray:
        places = self._places(address, bits)
        return np.ascontiguousarray(self.bytes[places]).view(UNSIGNED[bits])[..., 0]

    def store(self, address: np.ndarray, bits: int, values: np.ndarray) -> None:
        places = self._places(address, bits)
        self.bytes[places] = np.ascontiguousarray(values.astype(UNSIGNED[bits])[..., None]).view(np.uint8)

    def _places(self, address: np.ndarray, bits: int) -> np.ndarray:
        places = address.astype(np.int64)[..., None] + np.arange(bits // 8)
        assert not (address.astype(np.int64) % (bits // 8)).any(), "misaligned"
        inside = (places >= 0) & (places < len(self.bytes))
        assert inside.all(), "out of memory"
        assert self.usable[places].all(), "out of bounds"
        return places


def _span(x: torch.Tensor) -> int:
    """Bytes from the first element of a strided tensor to its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return 0 if x.numel() == 0 else (1 + last) * x.element_size()


def _bytes(x: torch.Tensor) -> np.ndarray:
    flat = x.detach().as_strided((_span(x) // x.element_size(),), (1,))
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)


def run(ptx: str, args: Sequence[torch.Tensor | int], grid: tuple[int, int], shared_bytes: int) -> None:
    """Run a kernel on tensors, which it changes, and integers, in the order of its parameters."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    memory = Memory(sum(_span(x) + 3 * GAP for x in tensors) + GAP, tensors)
    addresses = iter(memory.addresses)
    values = [next(addresses) if isinstance(x, torch.Tensor) else x for x in args]
    program = _parse(ptx)
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    for x in range(grid[0]):
        for y in range(grid[1]):
            _Block(program, threads, values, memory, shared_bytes, (x, y), grid).run()
    memory.read_back()


def _parse(ptx: str) -> tuple[list[tuple], dict[str, int]]:
    """Instructions `(predicate, opcode, operands)`, and the places of labels."""
    program, labels = [], {}
    body = ptx[ptx.index("\n{") :]
    body = re.sub(r"//[^\n]*", "", body)
    for line in body.splitlines():
        line = line.strip()
        if match := re.fullmatch(r"(\$?[\w$]+):", line):
            labels[match[1]] = len(program)
        elif line.startswith(".section"):
            break
        elif line.endswith(";") and not line.startswith("."):
            predicate, opcode, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*);", line).groups()
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", rest)
            program.append((predicate, opcode.split("."), operands))
    return program, labels


class _Block:
    """The threads of one block, and what they hold."""

    def __init__(self, program, threads, params, memory, shared_bytes, index, grid):
        self.program, self.labels = program
        self.threads, self.params, self.memory = threads, params, memory
        self.shared = Memory(shared_bytes)
        self.shared.usable[:] = True
        self.registers: dict[str, np.ndarray] = {"global_smem": np.zeros(threads, np.uint64)}
        for name, value in zip(
            ("%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y"), (*index, *grid), strict=True
        ):
            self.registers[name] = np.full(threads, value, np.uint64)
        self.registers["%tid.x"] = np.arange(threads, dtype=np.uint64)

    def run(self) -> None:
        at = 0
        while at < len(self.program):
            predicate, opcode, operands = self.program[at]
            at += 1
            mask = np.ones(self.threads, bool) if predicate is None else self.predicate(predicate)
            if opcode[0] == "ret":
                return
            if opcode[0] == "bra":
                assert mask.all() or not mask.any(), "threads part"
                at = self.labels[operands[0]] if mask[0] else at
            elif opcode[0] != "bar" and mask.any():
                with np.errstate(all="ignore"):
                    known = getattr(self, f"do_{opcode[0]}", None)
                    assert known, f"the instruction {'.'.join(opcode)} is not known here"
                    known(opcode, operands, mask)

    def predicate(self, name: str) -> np.ndarray:
        return ~self.registers[name[1:]] if name[0] == "!" else self.registers[name]

    def read(self, name: str, kind: str) -> np.ndarray:
        """An operand as a type of PTX: `u32`, `s64`, `f32`, `b16`, `pred`."""
        if kind == "pred":
            return self.registers[name] if name[0] == "%" else np.full(self.threads, int(name) != 0)
        bits = int(kind[1:])
        if name in self.registers:
            raw = self.registers[name]
        elif name.startswith("0f"):
            raw = np.full(self.threads, int(name[2:], 16))
        else:
            raw = np.full(self.threads, int(name, 0) & ((1 << bits) - 1), np.uint64)
        raw = raw.astype(UNSIGNED[bits])
        return raw if kind[0] in "bu" else raw.view(np.dtype(f"{'i' if kind[0] == 's' else 'f'}{bits // 8}"))

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize * 8])
        old = self.registers.get(name)
        if old is not None and not mask.all():
            value = np.where(mask, value, old.astype(value.dtype))
        self.registers[name] = value

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), "u64") + np.uint64(int(offset or 0))

    def do_ld(self, opcode, operands, mask):
        bits = int(opcode[-1][1:])
        if opcode[1] == "param":
            number = int(operands[1].strip("[]").rpartition("_")[2])
            wide = np.full(self.threads, self.params[number] if number < len(self.params) else 0, np.int64)
            self.write(operands[0], wide if operands[0].startswith("%rd") else wide.astype(np.int32), mask)
            return
        memory = self.shared if opcode[1] == "shared" else self.memory
        for i, name in enumerate(_names(operands[0])):
            value = np.zeros(self.threads, UNSIGNED[bits])
            value[mask] = memory.load(self.address(operands[1])[mask] + np.uint64(i * bits // 8), bits)
            self.write(name, value, mask)

    def do_st(self, opcode, operands, mask):
        bits = int(opcode[-1][1:])
        memory = self.shared if opcode[1] == "shared" else self.memory
        for i, name in enumerate(_names(operands[1])):
            address = self.address(operands[0])[mask] + np.uint64(i * bits // 8)
            memory.store(address, bits, self.read(name, f"b{bits}")[mask])

    def do_mov(self, opcode, operands, mask):
        self.write(operands[0], self.read(operands[1], opcode[-1]), mask)

    def do_cvt(self, opcode, operands, mask):
        to, source = opcode[-2:]
        if source == "bf16":
            self.write(operands[0], self.read(operands[1], "u16").astype(np.uint32) << np.uint32(16), mask)
        elif to == "bf16":
            value = torch.from_numpy(self.read(operands[1], source).copy()).bfloat16()
            self.write(operands[0], value.view(torch.int16).numpy(), mask)
        else:
            target = np.dtype(f"{'i' if to[0] == 's' else to[0]}{int(to[1:]) // 8}")
            self.write(operands[0], self.read(operands[1], source).astype(target), mask)

    def do_setp(self, opcode, operands, mask):
        compare = COMPARE[opcode[1]]
        self.write(operands[0], compare(*(self.read(x, opcode[-1]) for x in operands[1:])), mask)

    def do_selp(self, opcode, operands, mask):
        first, second = (self.read(x, opcode[-1]) for x in operands[1:3])
        self.write(operands[0], np.where(self.registers[operands[3]], first, second), mask)

    def do_shl(self, opcode, operands, mask):
        value = self.read(operands[1], opcode[-1])
        self.write(operands[0], value << self.read(operands[2], "u32").astype(value.dtype), mask)

    def do_shr(self, opcode, operands, mask):
        value = self.read(operands[1], opcode[-1])
        self.write(operands[0], value >> self.read(operands[2], "u32").astype(value.dtype), mask)

    def do_bfe(self, opcode, operands, mask):
        value = self.read(operands[1], opcode[-1])
        start, length = (int(x, 0) for x in operands[2:])
        # To the top, and back: a signed field keeps its sign.
        self.write(operands[0], value << (32 - start - length) >> (32 - length), mask)

    def do_neg(self, opcode, operands, mask):
        self.write(operands[0], -self.read(operands[1], opcode[-1]), mask)

    def do_ex2(self, opcode, operands, mask):
        self.write(operands[0], np.exp2(self.read(operands[1], "f32")), mask)

    def do_div(self, opcode, operands, mask):
        self._binary(np.divide, opcode, operands, mask)

    def do_add(self, opcode, operands, mask):
        self._binary(np.add, opcode, operands, mask)

    def do_sub(self, opcode, operands, mask):
        self._binary(np.subtract, opcode, operands, mask)

    def _bitwise(self, opcode, operands, mask):
        self._binary(BITWISE[opcode[0]], opcode, operands, mask)

    do_and = do_or = do_xor = _bitwise

    def do_mul(self, opcode, operands, mask):
        self.write(operands[0], self._product(opcode, operands), mask)

    def do_mad(self, opcode, operands, mask):
        product = self._product(opcode, operands)
        kind = f"{opcode[-1][0]}{product.dtype.itemsize * 8}"
        self.write(operands[0], product + self.read(operands[3], kind), mask)

    def do_fma(self, opcode, operands, mask):
        a, b, c = (self.read(x, "f32").astype(np.float64) for x in operands[1:])
        self.write(operands[0], (a * b + c).astype(np.float32), mask)

    def do_shfl(self, opcode, operands, mask):
        assert mask.all()
        assert opcode[1] == "sync"
        limit = self.read(operands[3], "s32") & 31
        assert not (self.read(operands[3], "s32") >> 8).any(), "parts of warps"
        lane, by = np.arange(self.threads) % LANES, self.read(operands[2], "s32")
        source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by}[opcode[2]]
        inside = source >= limit if opcode[2] == "up" else source <= limit
        source = np.where(inside, source, lane) + np.arange(self.threads) // LANES * LANES
        self.write(operands[0], self.read(operands[1], "b32")[source], mask)

    def do_ldmatrix(self, opcode, operands, mask):
        self._matrices(opcode, operands[1], _names(operands[0]), store=False)

    def do_stmatrix(self, opcode, operands, mask):
        self._matrices(opcode, operands[0], _names(operands[1]), store=True)

    def _matrices(self, opcode, address, names, *, store):
        """Lane l holds 32 bits of row l / 4 of each; lane 8 j + r has the address of row r of matrix j."""
        assert "trans" not in opcode
        rows = self.address(address).reshape(-1, LANES)
        lane = np.arange(LANES)
        for j, name in enumerate(names):
            places = (rows[:, 8 * j + lane // 4] + (4 * (lane % 4)).astype(np.uint64)).reshape(-1)
            if store:
                self.shared.store(places, 32, self.read(name, "b32"))
            else:
                self.write(name, self.shared.load(places, 32), np.ones(self.threads, bool))

    def _binary(self, function, opcode, operands, mask):
        self.write(operands[0], function(*(self.read(x, opcode[-1]) for x in operands[1:])), mask)

    def _product(self, opcode, operands):
        a, b = (self.read(x, opcode[-1]) for x in operands[1:3])
        if opcode[1] == "wide":
            wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
            a, b = a.astype(wide), b.astype(wide)
        return a * b


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]

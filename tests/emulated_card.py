"""A device `card`, emulated on the CPU, that counts what a GPU would be asked to do and waited for.

Tensors of this device compute on the CPU, but belong to another device: tensors of both devices in one
operation are refused, and code that asks for the device type sees one that is not a CPU. So the code paths of
accelerators run without one, and their cost per step can be tested: the number of kernels that would be
launched, and the number of times the host would wait for the device.

Copies on another stream arrive when the main stream waits for their event; what is read before is noise.

Both are counted by place (`file.py:line` of this project). A kernel is an operation that is not a view, an
allocation or a synchronisation; on a GPU some of them launch a few more (`sort`, `cumsum`). Operations of the
backward pass are counted at the line of the forward pass if the code runs under
`torch.autograd.detect_anomaly`.

The device is registered for the process, before its first backward pass, and cannot be removed: use it in a
process of its own.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from emulated_attention import ATTENTION
from torch.utils import _foreach_utils as foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import findrec

NAME = "card"
PACKAGE = str(Path(findrec.__file__).parent)

# Operations that read a value or a size from the device.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "bincount",
    "equal",
    "_linalg_check_errors",
    "_linalg_svd",
    "_linalg_eigh",
    "is_nonzero",
}
# Operations without a kernel, besides views.
FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "is_same_size",
    "resize_",
    "set_",
    "_fused_sdp_choice",
    "result_type",
    "_linalg_check_errors",
}
COPIES = {"_to_copy", "copy_"}


class _Module:
    """What torch asks of a device's module (`torch.cuda` for CUDA)."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers of the device are drawn by the generator of the CPU."""

    def mem_get_info(self, device: torch.device | str) -> tuple[int, int]:
        """Free and total bytes."""
        return 1 << 30, 1 << 30

    def Stream(self, device: torch.device | str) -> CardStream:  # noqa: N802 - named as in torch.cuda
        return CardStream()

    def stream(self, stream: CardStream) -> _Copying:
        """A context in whose thread copies are made on a stream."""
        return _Copying(stream)

    def current_stream(self, device: torch.device | str | None = None) -> CardStream:
        return MAIN

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@dataclass(eq=False)
class CardStream:
    """A stream: copies on one beside the main one are noise until their event is waited for."""

    # Pairs of the noise that a tensor holds and what will replace it.
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)  # told to the allocator by `record_stream`

    def record_event(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What has arrived when the event has happened."""
        event, self.late = self.late, []
        return event

    def wait_event(self, event: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Kernels that are launched from now on see what was copied before the event."""
        for held, value in event:
            held.copy_(value)


MAIN = CardStream()


def register() -> None:
    """Register the device in this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    # Optimizers treat lists of tensors at once for known types only.
    foreach_utils._foreach_supported_types.append(CardTensor)  # type: ignore[arg-type]


class CardTensor(torch.Tensor):
    """A tensor of the device `card`; its values are in `held`, on the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CardTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        wrapper.held = held
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"card({self.held})"

    def tolist(self) -> Any:
        """One copy to the host, as on a GPU."""
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        """Told by a user of memory on another stream."""
        stream.read.append(self)

    def new_tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One copy from the host, as on a GPU."""
        return self.held.new_tensor(*args, **kwargs).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


@dataclass
class Counts:
    """Kernels and waits by `place: operation`."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def num_kernels(self, *without: str) -> int:
        """Kernels in total, besides those at places that begin with one of `without`."""
        return sum(n for place, n in self.kernels.items() if not place.startswith(without or "\0"))

    @property
    def num_waits(self) -> int:
        """Waits in total."""
        return self.waits.total()

    def table(self) -> str:
        """What is counted where, most frequent first, as a message for a failed test."""
        lines = [f"{self.num_kernels()} kernels, {self.num_waits} waits"]
        for what, counter in (("waits", self.waits), ("kernels", self.kernels)):
            lines += [f"  {n:5d} {what} {place}" for place, n in counter.most_common()]
        return "\n".join(lines)


class Counting(TorchDispatchMode):
    """Runs operations on the emulated device and counts them in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __enter__(self) -> Counting:
        super().__enter__()
        # Made from Python numbers, tensors reach a device without a dispatched operation.
        self._patches = [mock.patch.object(torch, name, _copied(getattr(torch, name))) for name in _FROM_DATA]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for patch in self._patches:
            patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not _on_card(args, kwargs):
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if _waits(name, args, kwargs):
            self.counts.waits[f"{_place()}: {name}"] += 1
        result = _run(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        empty = bool(tensors) and not any(tensor.numel() for tensor in tensors)
        if _launches(func, name) and not empty and not (name == "copy_" and _is_itself(*args[:2])):
            self.counts.kernels[f"{_place()}: {name}"] += 1
        return result


class _Copying(TorchDispatchMode):
    """Runs operations of a thread on a stream, which may only be copies that nobody waits for."""

    def __init__(self, stream: CardStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func._overloadpacket.__name__
        if not _on_card(args, kwargs):
            return func(*args, **kwargs)
        result = _run(func, args, kwargs)
        if _launches(func, name):
            assert name == "_to_copy", f"{name} on a stream for copies"
            assert not _waits(name, args, kwargs), "the host waits for a copy"
            value = result.held.clone()
            result.held.fill_(77)
            self._stream.late.append((result.held, value))
        return result


_FROM_DATA = ("tensor", "as_tensor")


def _copied(make: Any) -> Any:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        value: torch.Tensor = make(*args, **kwargs)
        return value if device is None else value.to(device)

    return made


def _on_card(args: Any, kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == NAME:
        return True
    return any(isinstance(leaf, CardTensor) for leaf in tree_leaves((args, kwargs)))


def _launches(func: Any, name: str) -> bool:
    if name in FREE or name == "_local_scalar_dense":
        return False
    returns = func._schema.returns
    views = [r for r in returns if r.alias_info is not None and not r.alias_info.is_write]
    return not views or len(views) < len(returns)


def _is_itself(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are views of the same values, as in the copy that ends `x[rows] += 1`."""
    x, y = (t.held if isinstance(t, CardTensor) else t for t in (x, y))
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


def _waits(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        # A mask has as many rows as it has true elements; an index on the host is copied.
        return any(
            t is not None and (t.dtype in (torch.bool, torch.uint8) or not isinstance(t, CardTensor))
            for t in args[1]
        )
    if name in COPIES:
        on_card = [isinstance(t, CardTensor) for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        to = kwargs.get("device")
        if name == "_to_copy" and to is not None:
            on_card.append(torch.device(to).type == NAME)
        to_host = on_card[-1] is False if name == "_to_copy" else on_card[0] is False
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        # The host has to wait for values that it reads, whether or not the copy is asynchronous.
        return len(set(on_card)) > 1 and (to_host or not asynchronous)
    return name in WAITS


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values of its tensors."""
    name = func._overloadpacket.__name__
    device = kwargs.get("device")
    if name not in COPIES:
        _check_devices(name, args, kwargs)
    inner_args, inner_kwargs = tree_map_only(CardTensor, lambda tensor: tensor.held, (args, kwargs))
    to_host = device is not None and torch.device(device).type == "cpu"
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    if name == "_fused_sdp_choice":
        return 3  # `_scaled_dot_product_fused_attention_overrideable`
    result = ATTENTION.get(name, func)(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:
        return _written(func, args, kwargs, result)
    if to_host:
        return result.clone() if any(result is leaf for leaf in tree_leaves(inner_args)) else result
    return tree_map_only(torch.Tensor, CardTensor, result)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
    """The tensors that an operation in place or with `out=` returns: the ones given to it."""
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    written = [
        given[a.name]
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name in given
    ]
    aliased = [r.alias_info is not None for r in func._schema.returns]
    if not aliased:
        return None
    if all(aliased):
        return written[0] if len(aliased) == 1 else tuple(written)
    # Some results are new (for example batch norm): those are wrapped.
    return tree_map_only(torch.Tensor, CardTensor, result)


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """Refuse tensors of the host, but for scalars and indices, as CUDA does."""
    if name.startswith(("index", "_unsafe_index", "_index_put")):
        args = (args[0], *args[2:])
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CardTensor) and leaf.dim():
            raise RuntimeError(
                f"{name}: a tensor {tuple(leaf.shape)} of the CPU among tensors of the card, at {_place()}"
            )


def _place() -> str:
    """`file.py:line` of the innermost frame of the package, or of the forward pass in a backward pass."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return _short(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    if node is not None:
        metadata: Any = node.metadata
        trace = metadata.get("traceback_", ())
        found = [m for line in trace if (m := re.match(r'\s*File "(.+)", line (\d+)', line))]
        for match in reversed(found):
            if match[1].startswith(PACKAGE):
                return f"{_short(match[1], int(match[2]))} (backward)"
        return f"backward of {node.name()}"
    return "elsewhere"


def _short(path: str, line: int) -> str:
    return f"{path[len(PACKAGE) + 1 :]}:{line}"


def to_card(values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors on the device."""
    return [value.to(NAME) for value in values]

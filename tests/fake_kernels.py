"""A stand-in for the extension module of mamba-ssm, for machines without a GPU.

It refuses whatever the real functions refuse, and computes their results with torch: types, layouts, shapes
and order of arguments and results are those of `csrc/selective_scan/selective_scan.cpp` in mamba-ssm 2.3.2.
"On the GPU" means here: on the device of u.
"""

from __future__ import annotations

import types

import torch
from torch.nn import functional as F

CHUNK = 2048  # steps
INPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def selective_scan_cuda() -> types.ModuleType:
    """A module to put into `sys.modules`."""
    module = types.ModuleType("selective_scan_cuda")
    module.__dict__.update(fwd=_fwd, bwd=_bwd)
    return module


def _fwd(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus, /):
    _check_inputs(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus)
    y, states = _scan(u, delta, A, B, C, D_, delta_bias_, softplus=delta_softplus)
    out = torch.empty_like(delta).copy_(y)
    x = torch.stack([_decays(delta, A, delta_bias_, delta_softplus), states], -1).flatten(-2).float()
    if z_ is None:
        return [out, x]
    return [out, x, torch.empty_like(z_).copy_(y * F.silu(z_.float()))]


def _bwd(u, delta, A, B, C, D_, z_, delta_bias_, dout, x_, out_, dz_, delta_softplus, recompute_out_z, /):
    _check_inputs(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus)
    assert type(recompute_out_z) is bool
    batch, dim, length = u.shape
    _check(dout, "dout", dtype=u.dtype, shape=u.shape, like=u)
    chunks = -(-length // CHUNK)
    assert x_ is not None or chunks == 1
    if x_ is not None:
        _check(x_, "x", dtype=A.dtype, shape=(batch, dim, chunks, 2 * A.shape[1]), like=u)
        assert x_.is_contiguous()
        _, states = _scan(u, delta, A, B, C, D_, delta_bias_, softplus=delta_softplus)
        assert torch.allclose(x_[..., 1::2], states, atol=1e-3), "x is not what the forward pass returned"
    dy, dz = dout.float(), None
    if z_ is not None:
        assert out_ is not None
        _check(out_, "out", dtype=u.dtype, shape=u.shape, like=u)
        if dz_ is not None:
            _check(dz_, "dz", dtype=u.dtype, shape=u.shape, like=u)
        gate = torch.sigmoid(z_.float())
        slope = gate * (1 + z_.float() * (1 - gate))
        dz = (torch.empty_like(z_) if dz_ is None else dz_).copy_(dy * out_.float() * slope)
        dy = dy * z_.float() * gate
    inputs = [
        x if x is None else x.detach().float().requires_grad_() for x in (u, delta, A, B, C, D_, delta_bias_)
    ]
    with torch.enable_grad():
        y, _ = _scan(*inputs, softplus=delta_softplus)
    given = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(y, given, dy))
    du, ddelta, dA, dB, dC, dD, ddelta_bias = (None if x is None else next(grads) for x in inputs)
    results = [
        torch.empty_like(u).copy_(du),
        torch.empty_like(delta).copy_(ddelta),
        torch.zeros_like(A).copy_(dA),
        torch.zeros_like(B, dtype=torch.float32).copy_(dB).to(B.dtype),
        torch.zeros_like(C, dtype=torch.float32).copy_(dC).to(C.dtype),
        dD,  # None without D, as of an undefined tensor
        ddelta_bias,
    ]
    if z_ is not None:
        results.append(dz)
    if recompute_out_z:
        results.append(torch.empty_like(out_).copy_(out_.float() * F.silu(z_.float())))
    return results


def _check_inputs(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus):
    assert type(delta_softplus) is bool
    assert u.dtype in INPUT_TYPES
    assert A.dtype == torch.float32, "complex A is not needed here"
    batch, dim, length = u.shape
    states = A.shape[1]
    assert batch > 0 < length, "a grid of no blocks cannot be launched"
    assert B.ndim == C.ndim == 4, "B and C of every step, in groups"
    assert B.shape[1] == C.shape[1]
    groups = B.shape[1]
    assert dim % groups == 0
    assert states <= 256, "selective_scan only supports state dimension <= 256"
    _check(u, "u", dtype=u.dtype, shape=(batch, dim, length), like=u)
    _check(delta, "delta", dtype=u.dtype, shape=(batch, dim, length), like=u)
    assert A.shape == (dim, states)
    assert A.device == u.device
    _check(B, "B", dtype=u.dtype, shape=(batch, groups, states, length), like=u)
    _check(C, "C", dtype=u.dtype, shape=(batch, groups, states, length), like=u)
    if D_ is not None:
        _check(D_, "D", dtype=torch.float32, shape=(dim,), like=u)
    if delta_bias_ is not None:
        _check(delta_bias_, "delta_bias", dtype=torch.float32, shape=(dim,), like=u)
    if z_ is not None:
        _check(z_, "z", dtype=u.dtype, shape=(batch, dim, length), like=u)


def _check(x, name, *, dtype, shape, like):
    assert x.dtype == dtype, f"{name} is {x.dtype}"
    assert x.device == like.device, f"{name} is on {x.device}"
    assert tuple(x.shape) == tuple(shape), f"{name} is {tuple(x.shape)}"
    assert x.stride(-1) == 1 or x.shape[-1] == 1, f"{name} has strides {x.stride()}"
    # Not checked by the real functions, which read 16 bytes at once where whole blocks of steps allow.
    assert x.ndim == 1 or x.data_ptr() % 16 == 0, f"{name} is not aligned"


def _ready(delta, delta_bias, softplus):
    delta = delta.float()
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return F.softplus(delta) if softplus else delta


def _decays(delta, A, delta_bias, softplus):
    """The product of decays of each chunk, `[B, D, chunks, N]`."""
    total = torch.stack([x.sum(-1) for x in _ready(delta, delta_bias, softplus).split(CHUNK, -1)], -1)
    return torch.exp(total[..., None] * A[:, None])


def _scan(u, delta, A, B, C, D, delta_bias, *, softplus):
    """`y [B, D, L]` without gate, and the states at the ends of chunks `[B, D, chunks, N]`, in float32."""
    delta = _ready(delta, delta_bias, softplus)
    per_group = u.shape[1] // B.shape[1]
    B, C = (x.float().repeat_interleave(per_group, dim=1) for x in (B, C))  # [B, D, N, L]
    state = torch.zeros(*u.shape[:2], A.shape[1], device=u.device)
    outputs, ends = [], []
    length = u.shape[2]
    for step in range(length):
        now = delta[:, :, step, None]
        state = torch.exp(now * A) * state + now * B[..., step] * u[:, :, step, None].float()
        outputs.append((state * C[..., step]).sum(-1))
        if (step + 1) % CHUNK == 0 or step + 1 == length:
            ends.append(state)
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u.float()
    return y, torch.stack(ends, 2)

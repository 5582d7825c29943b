"""Kernels of the selective scan in Triton. Only `_scan_triton` imports this file, as it needs the package.

A program owns one row and a block of channels, and goes over the steps in chunks. The states of a chunk are
one tile `[S, D, N]` in registers, computed at once by an associative scan over its steps; only the state
before each chunk is stored. Sums over steps stay in one program, and sums over rows or blocks of channels are
left to the caller: nothing is added atomically, and results do not depend on the order of the programs.

Letters: S steps of a chunk, D channels of a block, N states padded to a power of two. Beyond the last step,
channel or state the inputs read as zeros: a time step of zero leaves the state as it is.
"""

# Triton reads annotations as objects: no `from __future__ import annotations` here.

import triton
import triton.language as tl


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    """The step `x -> decay_1 x + state_1` followed by `x -> decay_2 x + state_2`, as one step."""
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _load(pointer, rows, columns, row_stride, column_stride, mask, WIDE: tl.constexpr):
    """The elements `[rows, columns]` of a matrix at `pointer`, zeros where `mask` is false."""
    places = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + places, mask=mask, other=0.0).to(WIDE)


@triton.jit
def _store(pointer, rows, columns, row_stride, values, mask):
    """Write `values` to a matrix whose columns are adjacent."""
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], values, mask=mask)


@triton.jit
def _chunk_states(u_SD, delta_SD, A_DN, B_SN, state_DN):
    """The states `[S, D, N]` of a chunk that starts from `state_DN`, and what each step added to them."""
    decay = tl.exp(delta_SD[:, :, None] * A_DN[None, :, :])
    drive = (delta_SD * u_SD)[:, :, None] * B_SN[:, None, :]
    decay, states = tl.associative_scan((decay, drive), 0, _chain)
    return decay * state_DN[None, :, :] + states, drive


@triton.jit
def _row_of(values, index, wanted):
    """Row `wanted` of a tile `[S, D, N]` whose rows are numbered by `index`."""
    return tl.sum(tl.where((index == wanted)[:, None, None], values, 0.0), axis=0)


@triton.jit(do_not_specialize=["length"])  # or it is compiled anew for lengths of another kind
def scan_forward(
    u, delta, A, B, C, D, z, first, y, borders, last,
    length, channels, num_states,
    u_row, u_step, u_channel,
    delta_row, delta_step, delta_channel,
    B_row, B_step, B_state,
    C_row, C_step, C_state,
    z_row, z_step, z_channel,
    WIDE: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Outputs `y`, the state before every chunk but the first (`borders`), and the last state.

    `D`, `z`, `first`, `borders` and `last` may be None. Tensors without strides here are contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    n = tl.arange(0, STATES).to(tl.int64)
    s = tl.arange(0, STEPS)
    in_DN = (d < channels)[:, None] & (n < num_states)[None, :]
    A_DN = _load(A, d, n, num_states, 1, in_DN, WIDE)
    state_DN = tl.zeros((CHANNELS, STATES), WIDE)
    row_states = row * channels * num_states
    if first is not None:
        state_DN = _load(first + row_states, d, n, num_states, 1, in_DN, WIDE)
    if D is not None:
        D_D = tl.load(D + d, mask=d < channels, other=0.0).to(WIDE)
    num_chunks = tl.cdiv(length, STEPS)
    for chunk in range(0, num_chunks):
        at = chunk * STEPS + s.to(tl.int64)
        in_SD = (at < length)[:, None] & (d < channels)[None, :]
        in_SN = (at < length)[:, None] & (n < num_states)[None, :]
        u_SD = _load(u + row * u_row, at, d, u_step, u_channel, in_SD, WIDE)
        delta_SD = _load(delta + row * delta_row, at, d, delta_step, delta_channel, in_SD, WIDE)
        B_SN = _load(B + row * B_row, at, n, B_step, B_state, in_SN, WIDE)
        C_SN = _load(C + row * C_row, at, n, C_step, C_state, in_SN, WIDE)
        if borders is not None:
            border = (row * (num_chunks - 1) + chunk - 1) * channels * num_states
            _store(borders + border, d, n, num_states, state_DN, in_DN & (chunk > 0))
        states, _ = _chunk_states(u_SD, delta_SD, A_DN, B_SN, state_DN)
        state_DN = _row_of(states, s, STEPS - 1)
        y_SD = tl.sum(states * C_SN[:, None, :], axis=2)
        if D is not None:
            y_SD += u_SD * D_D[None, :]
        if z is not None:
            z_SD = _load(z + row * z_row, at, d, z_step, z_channel, in_SD, WIDE)
            y_SD *= z_SD / (1.0 + tl.exp(-z_SD))
        _store(y + row * length * channels, at, d, channels, y_SD, in_SD)
    if last is not None:
        _store(last + row_states, d, n, num_states, state_DN, in_DN)


@triton.jit(do_not_specialize=["length"])  # or it is compiled anew for lengths of another kind
def scan_backward(
    u, delta, A, B, C, D, z, first, borders, dy, dlast,
    du, ddelta, dA, dB, dC, dD, dz, dfirst,
    length, channels, num_states,
    u_row, u_step, u_channel,
    delta_row, delta_step, delta_channel,
    B_row, B_step, B_state,
    C_row, C_step, C_state,
    z_row, z_step, z_channel,
    dy_row, dy_step, dy_channel,
    WIDE: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients, from the last chunk to the first; `dA`, `dD` by rows, `dB`, `dC` also by blocks of channels.

    `dy` and `dlast` are the gradients of the outputs; `D` with `dD`, `z` with `dz`, `first` with `dfirst`,
    and `dlast` may be None. `dA` is `[B, D, N]`, `dD` `[B, D]`, `dB` and `dC` `[B, blocks, L, N]`.
    """
    row = tl.program_id(0).to(tl.int64)
    block = row * tl.num_programs(1) + tl.program_id(1)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    n = tl.arange(0, STATES).to(tl.int64)
    s = tl.arange(0, STEPS)
    in_DN = (d < channels)[:, None] & (n < num_states)[None, :]
    A_DN = _load(A, d, n, num_states, 1, in_DN, WIDE)
    row_states = row * channels * num_states
    # g is the gradient of each state: from its own output, and from the next state.
    g_DN = tl.zeros((CHANNELS, STATES), WIDE)
    if dlast is not None:
        g_DN = _load(dlast + row_states, d, n, num_states, 1, in_DN, WIDE)
    dA_DN = tl.zeros((CHANNELS, STATES), WIDE)
    if D is not None:
        D_D = tl.load(D + d, mask=d < channels, other=0.0).to(WIDE)
        dD_D = tl.zeros((CHANNELS,), WIDE)
    num_chunks = tl.cdiv(length, STEPS)
    for i in range(0, num_chunks):
        chunk = num_chunks - 1 - i
        at = chunk * STEPS + s.to(tl.int64)
        in_SD = (at < length)[:, None] & (d < channels)[None, :]
        in_SN = (at < length)[:, None] & (n < num_states)[None, :]
        u_SD = _load(u + row * u_row, at, d, u_step, u_channel, in_SD, WIDE)
        delta_SD = _load(delta + row * delta_row, at, d, delta_step, delta_channel, in_SD, WIDE)
        B_SN = _load(B + row * B_row, at, n, B_step, B_state, in_SN, WIDE)
        C_SN = _load(C + row * C_row, at, n, C_step, C_state, in_SN, WIDE)
        dy_SD = _load(dy + row * dy_row, at, d, dy_step, dy_channel, in_SD, WIDE)
        border = (row * (num_chunks - 1) + chunk - 1) * channels * num_states
        state_DN = _load(borders + border, d, n, num_states, 1, in_DN & (chunk > 0), WIDE)
        if first is not None:
            state_DN += _load(first + row_states, d, n, num_states, 1, in_DN & (chunk == 0), WIDE)
        states, drive = _chunk_states(u_SD, delta_SD, A_DN, B_SN, state_DN)
        place = row * length * channels
        if z is not None:
            y_SD = tl.sum(states * C_SN[:, None, :], axis=2)
            if D is not None:
                y_SD += u_SD * D_D[None, :]
            z_SD = _load(z + row * z_row, at, d, z_step, z_channel, in_SD, WIDE)
            gate_SD = 1.0 / (1.0 + tl.exp(-z_SD))
            dz_SD = dy_SD * y_SD * gate_SD * (1.0 + z_SD * (1.0 - gate_SD))
            _store(dz + place, at, d, channels, dz_SD, in_SD)
            dy_SD *= z_SD * gate_SD
        dC_SN = tl.sum(states * dy_SD[:, :, None], axis=1)
        _store(dC + block * length * num_states, at, n, num_states, dC_SN, in_SN)
        in_next = (at + 1 < length)[:, None] & (d < channels)[None, :]
        next_SD = _load(delta + row * delta_row, at + 1, d, delta_step, delta_channel, in_next, WIDE)
        decay = tl.exp(next_SD[:, :, None] * A_DN[None, :, :])
        from_output = dy_SD[:, :, None] * C_SN[:, None, :]
        decay, g = tl.associative_scan((decay, from_output), 0, _chain, reverse=True)
        g += decay * g_DN[None, :, :]
        g_DN = _row_of(g, s, 0)
        dB_SN = tl.sum(g * (delta_SD * u_SD)[:, :, None], axis=1)
        _store(dB + block * length * num_states, at, n, num_states, dB_SN, in_SN)
        from_input = tl.sum(g * B_SN[:, None, :], axis=2)  # gradient of delta * u
        exponent = g * (
            states - drive
        )  # gradient of delta * A: `states - drive` is what was left of the last
        ddelta_SD = tl.sum(exponent * A_DN[None, :, :], axis=2) + from_input * u_SD
        _store(ddelta + place, at, d, channels, ddelta_SD, in_SD)
        dA_DN += tl.sum(exponent * delta_SD[:, :, None], axis=0)
        du_SD = from_input * delta_SD
        if D is not None:
            du_SD += dy_SD * D_D[None, :]
            dD_D += tl.sum(dy_SD * u_SD, axis=0)
        _store(du + place, at, d, channels, du_SD, in_SD)
    _store(dA + row_states, d, n, num_states, dA_DN, in_DN)
    if D is not None:
        tl.store(dD + row * channels + d, dD_D, mask=d < channels)
    if dfirst is not None:
        in_D = (d < channels) & (length > 0)
        delta_D = tl.load(delta + row * delta_row + d * delta_channel, mask=in_D, other=0.0).to(WIDE)
        g_DN *= tl.exp(delta_D[:, None] * A_DN)
        _store(dfirst + row_states, d, n, num_states, g_DN, in_DN)

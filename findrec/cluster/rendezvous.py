"""Binds the store through which the workers of one machine connect to the loopback address.

PyTorch's TCPStore accepts connections on all addresses of the machine and has no authentication. Tested
with PyTorch 2.13 (see constraints.txt).
"""

from __future__ import annotations

import importlib
import ipaddress
import socket
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore


def bind_store_to_loopback() -> None:
    """Make rank 0 listen on the loopback address only, if that is where the workers connect."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # the name is also a function's
    create = rendezvous._create_c10d_store

    def create_store(
        host: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
    ) -> Any:
        if rank != 0 or not _is_loopback(host):
            return create(host, port, rank, world_size, timeout, use_libuv)
        listener = socket.create_server((host, port))
        return TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
            use_libuv=use_libuv,
        )

    rendezvous._create_c10d_store = create_store  # type: ignore[attr-defined]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Reads files of web servers and object stores in pieces, with a minimum transfer rate.

The transfer is aborted if almost no data arrive, be it in the headers or in the body of the response.
"""

from __future__ import annotations

import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import fsspec.core

TIMEOUT_S = 20.0  # longest wait for data of a connection
WINDOW_S = 60.0  # over which the rate of a transfer is measured
MIN_RATE = 1024  # bytes per second
PIECE = 1 << 20


class TransferError(Exception):
    """A transfer failed, but may succeed if it is tried again."""


class UnavailableError(Exception):
    """The file cannot be fetched, and trying again would not help."""


def read_pieces(
    url: str, begin: int = 0, *, on_size: Callable[[int], None] = lambda _: None
) -> Iterator[bytes]:
    """Read a file in pieces, from byte `begin` on; `on_size` is called with its size if that is known.

    Raises:
        TransferError: If the connection fails.
        UnavailableError: If there is no such file, or less than `MIN_RATE` bytes per second arrive.
    """
    read = _http_pieces if url.startswith(("http://", "https://")) else _object_pieces
    # A blocked read cannot be interrupted, so a thread does it; an abandoned one ends with its connection.
    pieces: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=4)
    abandoned = threading.Event()

    def put(piece: bytes | Exception | None) -> bool:
        while not abandoned.is_set():
            try:
                pieces.put(piece, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for piece in read(url, begin, on_size):
                if not put(piece):
                    return
            put(None)
        except Exception as error:
            put(error)

    threading.Thread(target=work, name="findrec-read", daemon=True).start()
    try:
        waited, received = 0.0, 0
        while True:
            start = time.monotonic()
            try:
                piece = pieces.get(timeout=max(WINDOW_S - waited, 0.001))
            except queue.Empty:
                piece = b""
            waited += time.monotonic() - start
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                return
            received += len(piece)
            if waited >= WINDOW_S:
                if received < MIN_RATE * WINDOW_S:
                    raise UnavailableError(
                        f"the server is too slow: {received:,} bytes in {waited:.0f} s, less than "
                        f"{MIN_RATE:,} bytes per second"
                    )
                waited, received = 0.0, 0
            if piece:
                yield piece
    finally:
        abandoned.set()


def _http_pieces(url: str, begin: int, on_size: Callable[[int], None]) -> Iterator[bytes]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            skip = begin if response.status != 206 else 0  # a server may ignore the range
            expected, received = response.headers.get("Content-Length"), 0
            if expected is not None:
                on_size(int(expected) + (begin if response.status == 206 else 0))
            while piece := response.read1(PIECE):
                received += len(piece)
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                yield piece[skip:]
                skip = 0
            if expected is not None and received < int(expected):
                raise TransferError(f"the connection ended after {received:,} of {int(expected):,} bytes")
    except UnavailableError:
        raise
    except urllib.error.HTTPError as error:
        message = f"HTTP {error.code} {error.reason}"
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise TransferError(message) from None
        raise UnavailableError(message) from None
    except urllib.error.URLError as error:
        raise TransferError(str(error.reason)) from None
    except (OSError, ValueError, EOFError) as error:
        raise TransferError(str(error) or type(error).__name__) from None
    except Exception as error:  # http.client raises its own, such as IncompleteRead
        if type(error).__module__ != "http.client":
            raise
        raise TransferError(str(error) or type(error).__name__) from None


def _object_pieces(url: str, begin: int, on_size: Callable[[int], None]) -> Iterator[bytes]:
    """Read an object of a store in pieces; the store's client finds the credentials."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        with filesystem.open(path, "rb") as stream:
            size = int(filesystem.size(path) or 0)
            on_size(size)
            stream.seek(begin)
            while piece := stream.read(PIECE):
                yield piece
            if stream.tell() < size:
                raise TransferError(f"the connection ended after {stream.tell():,} of {size:,} bytes")
    except ImportError as error:
        raise UnavailableError(f"{error} (s3:// needs the package s3fs, gs:// gcsfs)") from None
    except FileNotFoundError:
        raise UnavailableError("no such object") from None
    except (TransferError, UnavailableError):
        raise
    except Exception as error:  # each store's client has its own exceptions
        raise TransferError(f"{type(error).__name__}: {error}") from None

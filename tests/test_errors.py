"""Faults of the system become one message with a remedy; faults of the program do not."""

import errno
import os
import time

import pytest

from findrec.errors import suggest, system_error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_message():
    with open("/dev/full", "wb", buffering=0) as out, pytest.raises(OSError, match="No space") as full:
        out.write(b"x")
    said = str(system_error(full.value))
    assert said.startswith("[Errno 28] No space left on device. ")
    assert "Free some space" in said


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_folders_that_cannot_be_written_are_named(code):
    said = str(system_error(OSError(code, os.strerror(code), "/runs/a")))
    assert said.startswith(f"{os.strerror(code)}: /runs/a. Change its rights")


def test_what_another_process_quotes_is_recognised():
    said = str(system_error(RuntimeError("worker:\n  OSError: [Errno 28] No space left on device\nat x")))
    assert said.startswith("OSError: [Errno 28] No space left on device. Free")


def test_other_errors_are_not_hidden():
    assert system_error(ValueError("a bug")) is None
    assert system_error(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None
    assert system_error(None) is None


def test_the_nearest_name_is_suggested():
    assert suggest("pric", (name for name in ("title", "price"))) == "; did you mean 'price'?"
    assert suggest("colour", ["title"]) == ""


def test_nothing_is_suggested_where_it_would_take_long():
    known = [f"a film with the number {number}" for number in range(1_000_000)]
    begin = time.perf_counter()
    assert suggest("a film with the number 7777777", known) == ""
    assert suggest("a film" * 1000, known[:9]) == ""
    assert time.perf_counter() - begin < 1  # with all compared: half a minute

"""After the call a freed buffer is taken again without new page faults."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from findrec.training.allocator import keep_freed_memory
assert keep_freed_memory()
def use():
    for _ in range(3):
        torch.ones(4 << 20).add_(1)  # 16 MiB
for _ in range(5):  # until buffers are reused
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_buffers_are_taken_again_without_page_faults():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    pages = 20 * 3 * (16 << 20) // resource.getpagesize()
    assert int(done.stdout) < 0.05 * pages

"""Two settings that make updates on a CPU faster (docs/SPEED.md). Scripts import this before torch.

Idle threads sleep soon. GNU OpenMP's threads, which torch uses, spin while they wait for work. Where other work shares
the machine, that slows the updates down. OpenMP reads the setting when it is loaded. A value that is already set is
kept.

Freed memory is kept. Every update allocates and frees tensors of the same sizes. By default glibc may return their
memory to the operating system each time. Getting it back is slow, since the system clears it first.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
libc = ctypes.CDLL(None) if os.name == "posix" else None
if hasattr(libc, "mallopt"):  # only glibc has it
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # allocations of up to 32 MiB are reused
    libc.mallopt(M_TRIM_THRESHOLD, 512 * 2**20)  # up to 512 MiB of free memory are kept

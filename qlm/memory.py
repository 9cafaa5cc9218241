"""How much memory this process has taken, and giving back what it does not need."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps freed tensors of up to 32 MB, and its heap grew by a shard with every block."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(reset: bool = False) -> int:
    """Peak resident bytes of this process since the last reset (Linux), or since it started; mapped files count as far as they
    were touched."""
    if reset:
        # What was left behind before is not part of what comes.
        gc.collect()
        release_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The most memory that this process has held. Imports nothing of ours, so the peers can count the same way."""

import resource
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Forget the peak so far; only Linux can, elsewhere the peak is that of the whole process."""
    if RESET.exists():
        RESET.write_text("5")


def peak_memory_mib() -> int:
    """The most resident memory since the last reset. getrusage alone would count what the parent held at the fork."""
    if STATUS.exists():
        peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

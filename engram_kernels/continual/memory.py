"""Resident memory of this process, and the free memory of the system, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_RESET_PEAK = Path("/proc/self/clear_refs")


class MemoryMeter:
    """Peak resident memory above that at its creation.

    On Linux the kernel's high-water mark (VmHWM) is reset at creation where that is allowed, so that
    the momentary memory of loading the data does not count as that of training. Elsewhere the process's overall
    peak is used, which can only hide a peak lower than an earlier one.
    """

    def __init__(self) -> None:
        """Start measuring."""
        # The first optimizer of a process makes torch load its compiler, 150 MB: no more a cost of training
        # than importing torch is. Let it happen before the baseline.
        torch.optim.SGD([torch.zeros(1)])
        self._earlier_peak: int | None = None
        self.can_reset = False
        self.restart()
        self._start = _field_bytes(_STATUS, "VmRSS")
        if self._start is None:
            self._start = self._earlier_peak

    def restart(self) -> None:
        """Forget the peak so far, where that is allowed; the memory to compare with stays that at creation."""
        self._earlier_peak = self.peak_total()
        try:
            _RESET_PEAK.write_text("5")  # proc(5): 5 resets the peak resident set size to the current one
            self.can_reset = True
        except OSError:
            self.can_reset = False

    def peak_above_start(self) -> int | None:
        """Bytes; None where the system does not provide it."""
        peak = _peak_bytes()
        return None if peak is None or self._start is None else max(0, peak - self._start)

    def peak_total(self) -> int | None:
        """Bytes of the whole process, from its start; None where the system does not provide it."""
        peaks = [peak for peak in (self._earlier_peak, _peak_bytes()) if peak is not None]
        return max(peaks, default=None)


def available_bytes() -> int | None:
    """Memory that could be had now without swapping; None where the system does not provide it."""
    return _field_bytes(_SYSTEM, "MemAvailable")


def _peak_bytes() -> int | None:
    peak = _field_bytes(_STATUS, "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else 1024 * usage


def _field_bytes(path: Path, field: str) -> int | None:
    try:
        # the name of the process is in it, in any encoding, perhaps cut within a character
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)

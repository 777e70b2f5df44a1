"""The resident memory of this process, as Linux counts it."""

from pathlib import Path

PROCESS = Path("/proc/self")


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes resident at any time since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    (PROCESS / "clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)

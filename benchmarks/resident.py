"""What the kernel says of this process's memory, in MiB."""

from __future__ import annotations

from pathlib import Path

PROCESS = Path("/proc/self")


def resident() -> dict[str, float]:
    """MiB held now, of that by mapped files, and at most since the start or `forget_peak`."""
    lines = (PROCESS / "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"held": "VmRSS", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) / 1024 for name, field in names.items()}


def forget_peak() -> None:
    """Let the peak begin anew."""
    (PROCESS / "clear_refs").write_text("5")

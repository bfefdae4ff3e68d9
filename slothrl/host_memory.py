"""How much of the host's memory this process may still take: a container's limit counts, which the machine hides."""

from __future__ import annotations

from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's own, by its namespace
# Limit, what is taken, and the name of files' pages in memory.stat, which are given back on demand: version 2, 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def free_of_host(control_group: Path = CONTROL_GROUP) -> int:
    """Bytes of the host's memory that nobody has, as far as the process's control group is allowed to take them.

    More than that is not refused: the kernel ends a process of the group.
    """
    left = [psutil.virtual_memory().available]
    for limit, taken, files in _FILES:
        try:
            most = (control_group / limit).read_text().strip()
            used = int((control_group / taken).read_text())
            stat = (control_group / taken).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if most.isdigit():  # else "max"
            reclaimable = dict(zip(stat[::2], stat[1::2], strict=False)).get(files, "0")
            left.append(max(0, int(most) - used + int(reclaimable)))
    return min(left)

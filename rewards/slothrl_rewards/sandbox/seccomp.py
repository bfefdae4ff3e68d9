"""The system calls a sandboxed program must not make, as a classic BPF program for bwrap's `--seccomp`."""

from __future__ import annotations

import functools
import platform
import struct

# uname's machine: (audit architecture, column of the tables below)
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# call: (x86-64, aarch64), from Linux' unistd headers. None: the architecture has no such call.
_NEW_PROCESS = {"fork": (57, None), "vfork": (58, None)}
_OTHER_PROCESSES = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
_NETWORK = {"socket": (41, 198), "socketpair": (53, 199)}
# Memory and kernel objects that RLIMIT_AS does not count; a detached SysV segment would be one.
_UNCOUNTED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "io_setup": (206, 0), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "fanotify_init": (300, 262), "landlock_create_ruleset": (444, 444),
    # A tmpfs keeps them beside the files' contents: 500 MB a second, and its size does not bound them.
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
}  # fmt: skip
# Large and often attacked parts of the kernel that no program of ours needs.
_KERNEL = {
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "uselib": (134, None),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "personality": (135, 92),
}  # fmt: skip
_MOUNTS = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip
_DENIED = _NEW_PROCESS | _OTHER_PROCESSES | _NETWORK | _UNCOUNTED | _KERNEL | _MOUNTS
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # x86-64's second ABI: the same calls under other numbers

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | 1, 0x00050000 | 38


class UnknownMachine(Exception):
    """There is no table of system calls for this processor."""


def denied(machine: str | None = None) -> dict[str, int]:
    """The refused calls by name, with their numbers.

    Args:
        machine: uname's name of the processor; default: this one.

    Raises:
        UnknownMachine: neither x86-64 nor aarch64.
    """
    _, column = _architecture(machine)
    found = {name: numbers[column] for name, numbers in _DENIED.items()}
    return {name: number for name, number in found.items() if number is not None}


@functools.cache
def program(machine: str | None = None) -> bytes:
    """Assemble the filter.

    Refused with EPERM: new processes (threads are allowed: `clone` with CLONE_THREAD), signals to others, the network,
    tracing, uncounted memory, mounts and namespaces. `clone3` gets ENOSYS, as its flags lie in memory that a filter
    cannot read, and the C library then falls back to `clone`. A call through another ABI kills the process.

    Args:
        machine: uname's name of the processor; default: this one.

    Returns:
        `struct sock_filter`s, 8 bytes each.

    Raises:
        UnknownMachine: neither x86-64 nor aarch64.
    """
    audit, column = _architecture(machine)
    # (code, operand, label if true, label if false); None: go on with the next instruction
    steps: list[tuple[int, int, str | None, str | None]] = [
        (_LOAD, _ARCH, None, None), (_EQUAL, audit, None, "kill"), (_LOAD, _NR, None, None),
    ]  # fmt: skip
    if column == 0:
        steps.append((_AT_LEAST, _X32, "eperm", None))
    steps += [(_EQUAL, _CLONE3[column], "enosys", None), (_EQUAL, _CLONE[column], "clone", None)]
    steps += [(_EQUAL, number, "eperm", None) for number in sorted(denied(machine).values())]
    labels = {"allow": len(steps), "clone": len(steps) + 1}
    labels |= {"eperm": len(steps) + 3, "enosys": len(steps) + 4, "kill": len(steps) + 5}
    steps += [
        (_RETURN, _ALLOW, None, None),
        (_LOAD, _FIRST_ARGUMENT, None, None), (_ANY_BIT, _CLONE_THREAD, "allow_thread", None),
        (_RETURN, _EPERM, None, None), (_RETURN, _ENOSYS, None, None), (_RETURN, _KILL, None, None),
        (_RETURN, _ALLOW, None, None),  # jumps only go forward, hence a second one
    ]  # fmt: skip
    labels["allow_thread"] = len(steps) - 1
    return b"".join(
        struct.pack("=HBBI", code, _distance(labels, yes, here), _distance(labels, no, here), operand)
        for here, (code, operand, yes, no) in enumerate(steps)
    )


def _distance(labels: dict[str, int], label: str | None, here: int) -> int:
    return labels[label] - here - 1 if label else 0


def _architecture(machine: str | None) -> tuple[int, int]:
    name = machine or platform.machine()
    if name not in _ARCHITECTURES:
        raise UnknownMachine(f"no table of system calls for {name}; there are {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[name]

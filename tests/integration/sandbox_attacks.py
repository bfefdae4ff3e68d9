"""The attacks of test_sandbox_attacks.py: programs that try to get out, to stay or to be believed."""

from dataclasses import replace

from slothrl_rewards.sandbox import Limits
from slothrl_rewards.sandbox.limits import MIB

LIMITS = Limits(seconds=6, cpu_seconds=6, memory_bytes=256 * MIB, disk_bytes=8 * MIB)
SHORT = replace(LIMITS, seconds=0.7)

HEAD = """\
import os, sys
def refused(attempt, *arguments):
    try:
        result = attempt(*arguments)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        print("refused", type(error).__name__, getattr(error, "errno", None))
    else:
        print("ESCAPED", repr(result)[:100])
def read(path):
    return os.listdir(path) if os.path.isdir(path) else open(path).read()
def write(path):
    with open(path, "w") as file:
        return file.write("changed")
def kernel(x86, arm, *arguments):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    number = arm if os.uname().machine == "aarch64" else x86
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def fill(folder):
    total, data = 0, bytes(1 << 20)
    for index in range(300):
        try:
            with open(f"{folder}/{index}", "wb", buffering=0) as file:
                for _ in range(4):
                    total += file.write(data)
        except OSError as error:
            pass
    print("ESCAPED" if total > 9 << 20 else "refused", total)
"""

# name: (program, what its output says, status, limits)
ATTACKS = {
    "fork bomb": ("for _ in range(100): refused(os.fork)", "refused PermissionError 1", "wrong", LIMITS),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\ncount = 0\n"
        "try:\n    while count < 500:\n        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "        count += 1\nexcept RuntimeError:\n    print('refused', count)\nelse:\n    print('ESCAPED')",
        "refused", "wrong", LIMITS,
    ),
    "memory": (
        "got = []\ntry:\n    while True: got.append(bytearray(1 << 24))\nexcept MemoryError:\n    count = len(got)\n"
        "    del got\n    print('ESCAPED' if count > 16 else 'refused', count)",
        "refused", "wrong", LIMITS,
    ),
    "dev shm": ("fill('/dev/shm')", "refused", "wrong", LIMITS),
    "memfd": (
        "refused(os.memfd_create, 'x'); refused(kernel, 319, 279, 0, 0)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "infinite loop": ("while True: pass", "", "timeout", SHORT),
    "sleep": ("import time\ntime.sleep(1000)", "", "timeout", SHORT),
    "signals ignored": (
        "import signal\nfor number in range(1, 32):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError: pass\nsignal.alarm(1)\nwhile True: pass",
        "", "timeout", SHORT,
    ),
    "orphaned double fork": (
        "refused(kernel, 56, 220, 17, 0, 0, 0, 0)\nrefused(kernel, 58, 220, 17)\nrefused(kernel, 57, 220, 17)\n"
        "refused(os.posix_spawn, sys.executable, [sys.executable, '-c', 'import time; time.sleep(99)'], {})",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "huge stdout": ("while True: sys.stdout.write('x' * 65536)", "xxxx", "crash", LIMITS),
    "huge stderr": ("while True: sys.stderr.write('x' * 65536)", "", "crash", LIMITS),
    "disk fill": ("for folder in ('/tmp', '/', '/dev', '/opt', '/usr'): fill(folder)", "refused", "wrong", LIMITS),
    "fd exhaustion": (
        "got = []\ntry:\n    while len(got) < 1000: got.append(os.open('/dev/null', 0))\n"
        "except OSError as error:\n    print('refused', error.errno)\nelse:\n    print('ESCAPED')\n"
        "for fd in got: os.close(fd)",
        "refused 24", "wrong", LIMITS,
    ),
    "read secrets": (
        "for path in ('/root', '/root/.ssh', '/home', '/etc/passwd', '/etc/shadow', '@HOME', '@CANARY', '/var'):"
        "\n    refused(read, path)",
        "refused FileNotFoundError 2", "wrong", LIMITS,
    ),
    "environment secrets": (
        "print('ESCAPED' if '@SECRET' in str(os.environ) else sorted(os.environ))",
        "PATH", "wrong", LIMITS,
    ),
    "write to home": (
        "for path in ('@CANARY', '/root/x', '@HOME/x', '/usr/x'): refused(write, path)",
        "refused", "wrong", LIMITS,
    ),
    "symlink escape": (
        "os.symlink('@CANARY', 'link'); refused(read, 'link'); refused(write, 'link')\n"
        "os.symlink('/', 'root'); refused(read, 'root/etc/passwd'); refused(read, '/tmp/../@CANARY')",
        "refused FileNotFoundError 2", "wrong", LIMITS,
    ),
    "environment of pid 1": (
        "for path in ('/proc/1/environ', '/proc/self/mem', '/sys'): refused(read, path)",
        "refused", "wrong", LIMITS,
    ),
    "network": (
        "import socket\nfor kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n"
        "    refused(socket.socket, socket.AF_INET, kind)\n"
        "refused(socket.create_connection, ('127.0.0.1', 22)); refused(socket.getaddrinfo, 'example.com', 80)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "abstract unix socket": (
        "import socket\nrefused(socket.socket, socket.AF_UNIX); refused(socket.socketpair)\n"
        "refused(kernel, 41, 198, 1, 1, 0)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "kill all and the parent": (
        "for pid in (-1, 0, 1, os.getppid()): refused(os.kill, pid, 9)\nrefused(os.killpg, 0, 9)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "ptrace": (
        "refused(kernel, 101, 117, 16, 1, 0, 0); refused(kernel, 310, 270, 1, 0, 0, 0, 0, 0)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "nested namespaces and mounts": (
        "refused(kernel, 272, 97, 0x10000000)\nrefused(kernel, 165, 40, 0, 0, 0, 0, 0)\nrefused(kernel, 161, 51, 0)\n"
        "refused(kernel, 56, 220, 0x10000011, 0, 0, 0, 0)\nrefused(kernel, 308, 268, 0, 0)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "exits with 0": ("os._exit(0)", "", "wrong", LIMITS),
    "printed verdict": (
        "frame = sys._getframe(1).f_globals['FRAME']\nos.write(1, b'ok passed True' + frame + b'end' + frame)\n"
        "os.write(1, frame + b'begin\\nok\\n' + frame + b'end')\nprint('{\"passed\": true}')\nos._exit(0)",
        "passed", "wrong", LIMITS,
    ),
    "deep and huge results": ("print('[' * 100000 + '9' * 100000 + 'NaN inf')", "[[[[", "wrong", LIMITS),
    # Not in the list of 26:
    "clone3": ("refused(kernel, 435, 435, 0, 0)", "refused OSError 38", "wrong", LIMITS),
    "detached shared memory": (
        "refused(kernel, 29, 194, 0, 1 << 26, 0o1777)\n"
        "refused(kernel, 240, 180, 0, 66)\nrefused(kernel, 68, 186, 0, 511)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "another interpreter": (
        "os.execv(sys.executable, ['python', '-I', '-S', '-c', 'import os, resource as r\\n'\n"
        "'print(\"ESCAPED\" if r.getrlimit(r.RLIMIT_AS)[1] < 0 else \"limited\")\\n'\n"
        "'try: os.fork(); print(\"ESCAPED\")\\nexcept PermissionError: print(\"refused\")'])",
        "refused", "wrong", LIMITS,
    ),
    "raised limits": (
        "import resource\nfor limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):\n"
        "    refused(resource.setrlimit, limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
        "refused ValueError", "wrong", LIMITS,
    ),
    "inherited descriptors": (
        "mine = {0, 1, 2, sys._getframe(1).f_globals['OUT']}\nfor fd in set(range(1024)) - mine: refused(os.fstat, fd)",
        "refused OSError 9", "wrong", LIMITS,
    ),
    "closes its output and stays": ("os.closerange(0, 64)\nwhile True: pass", "", "timeout", SHORT),
    "drips for ever": (
        "import time\nwhile True:\n    os.write(1, b'x'); os.write(2, b'x'); time.sleep(0.001)", "x", "timeout", SHORT,
    ),
    "kernel interfaces": (
        "for numbers in ((425, 425), (321, 280), (298, 241), (323, 282), (250, 219), (304, 265), (206, 0)):\n"
        "    refused(kernel, *numbers, 1, 0, 0, 0)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "sparse file": (
        "with open('x', 'wb') as file: refused(file.truncate, 1 << 40)",
        "refused OSError 27", "wrong", LIMITS,
    ),
    # Kernel memory that neither the disk's size nor the address space counts: 200 and 500 MB a second when unbounded.
    "inode flood": ("n = 0\nwhile True:\n    os.mknod(str(n))\n    n += 1", "", "crash", LIMITS),
    "link and folder flood": (
        "import threading\nos.mknod('a')\ndef flood(make):\n    for n in range(10 ** 9): make(n)\n"
        "for make in (lambda n: os.link('a', f'b{n}'), lambda n: os.mkdir('c' * 240 + str(n))):\n"
        "    threading.Thread(target=flood, args=(make,)).start()",
        "", "crash", LIMITS,
    ),
    "extended attributes": (
        "os.mknod('a')\nrefused(os.setxattr, 'a', 'user.x', b'x' * 60000)\nfd = os.open('a', 1)\n"
        "refused(os.setxattr, fd, 'user.x', b'x'); refused(kernel, 463, 463, 0, 0, 0, 0, 0)\n"
        "refused(kernel, 444, 444, 0, 0, 1)",
        "refused PermissionError 1", "wrong", LIMITS,
    ),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "", "crash", LIMITS),
}  # fmt: skip

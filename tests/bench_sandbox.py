"""How many sandboxed verdicts a second: `python tests/bench_sandbox.py [workers] [verdicts]`."""

from __future__ import annotations

import os
import platform
import sys
import time
from statistics import median

from slothrl_rewards.code import code_tests, judge
from slothrl_rewards.sandbox import run_python, self_test

FIB = "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"
SUM = "n = int(input())\nprint(sum(int(input()) for _ in range(n)))"
IMPORTS = "import math, collections, itertools, heapq, re\n" + FIB
ASSERTS = [f"assert fib({n}) == {value}" for n, value in ((0, 0), (1, 1), (10, 55), (90, 2880067194370816120))]
PAIRS = [{"input": f"{n}\n" + "7\n" * n, "output": str(7 * n)} for n in (1, 10, 100)]


def rate(code: str, tests: list, workers: int, count: int) -> float:
    """Verdicts a second of `count` candidates, all of which pass."""
    began = time.perf_counter()
    scores = code_tests(["?"] * count, [code] * count, tests=[tests] * count, workers=workers)
    assert scores == [1.0] * count
    return count / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    began = time.perf_counter()
    jail = self_test()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}, {' '.join(jail.start)}")
    print(f"self-test, once a process: {1000 * (time.perf_counter() - began):.0f} ms")
    print(f"an empty program: {1000 * median(run_python('').seconds for _ in range(30)):.1f} ms (median of 30)")
    print(f"one verdict: {1000 * median(judge(FIB, ASSERTS).outcome.seconds for _ in range(30)):.1f} ms (median of 30)")
    for name, code, tests in (
        ("4 asserts", FIB, ASSERTS),
        ("4 asserts, 5 imports", IMPORTS, ASSERTS),
        ("3 inputs", SUM, PAIRS),
    ):
        print(f"{name}: {rate(code, tests, workers, count):.0f} verdicts/s with {workers} workers ({count} verdicts)")


if __name__ == "__main__":
    main()

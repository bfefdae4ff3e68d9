"""gsm8k verdicts a second through an isolated worker, beside the same calls in this process.

python tests/bench_rewards.py [--workers N]
"""

import argparse
import time
from pathlib import Path

from slothrl.config import RewardConfig
from slothrl.reward_isolation import open_rewards
from slothrl.reward_workers import closing_workers

SENTENCES = "She buys 3 boxes of 12 eggs, so 3 * 12 = 36 eggs. Each costs $0.25, which makes 36 * 0.25 = $9. "


def batch(size: int, length: int) -> dict:
    """Completions of about `length` characters, every other one right, with token ids as TRL gives them."""
    texts = [(SENTENCES * (length // len(SENTENCES) + 1))[:length] + f"\n#### {n % 2 + 8}" for n in range(size)]
    return {
        "prompts": [[{"role": "user", "content": "How much do the eggs cost?"}]] * size,
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(range(1000, 1000 + length // 4)) for _ in range(size)],
        "answer": ["3 * 12 = 36. 36 / 4 = 9 #### 9"] * size,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1)
    workers = parser.parse_args().workers
    with closing_workers():
        for isolate in (True, False):
            begun = time.perf_counter()
            config = RewardConfig(functions=["gsm8k"], isolate=isolate, workers=workers)
            (reward,) = open_rewards(config, None, Path.cwd())
            print(f"isolate={isolate} ({workers} workers): ready in {time.perf_counter() - begun:.2f} s")
            for size, length in ((1, 1000), (16, 1000), (64, 1000), (64, 8000)):
                given, calls, begun = batch(size, length), 0, time.perf_counter()
                while time.perf_counter() - begun < 2:
                    assert reward(**given) == [float(n % 2) for n in range(size)]
                    calls += 1
                rate = calls * size / (time.perf_counter() - begun)
                print(f"  batch {size:3}, {length:5} characters: {rate:8,.0f} verdicts/s")


if __name__ == "__main__":
    main()

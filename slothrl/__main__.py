"""`python -m slothrl [command] …`: a table of commands, one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

COMMANDS = {
    "train": ("slothrl.train", "train a model: python -m slothrl [train] group=choice key=value … (the default)"),
    "doctor": ("slothrl.doctor", "is this machine ready? every part tried, with the fix for what is not"),
    "fit": (
        "slothrl.fit",
        "will it fit? memory by phase, predicted without weights: python -m slothrl fit …",
    ),
    "export": (
        "slothrl.export",
        "a trained adapter for elsewhere: python -m slothrl export RUN --format peft|merged|gguf",
    ),
    "eval": (
        "slothrl.eval_command",
        "the held-out score of any adapter: python -m slothrl eval adapter=PATH key=value …",
    ),
    "report": ("slothrl.report_command", "a run's report again, or runs compared: python -m slothrl report RUN …"),
    "bench": ("slothrl.bench", "speed and memory on this GPU: python -m slothrl bench [NAME]"),
    "tune": ("slothrl.tune_command", "faster generation from nf4 on this GPU: python -m slothrl tune key=value …"),
    "reward": ("slothrl.reward_command", "try reward functions without a model: python -m slothrl reward key=value …"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit codes: 0, 2 for a mistake of the user's, 1 after a fault, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    if arguments[:1] == ["commands"]:
        print("\n".join(f"{name:10} {line}" for name, (_, line) in COMMANDS.items()))
        return 0
    command: Callable[[list[str]], int] = import_module(COMMANDS[name][0]).main
    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())

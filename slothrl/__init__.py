"""slothrl: RL fine-tuning (GRPO first) of language models with LoRA on one consumer GPU.

Importing this changes nothing in any other library and loads nothing heavy: the trainers arrive on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from slothrl.trainers.grpo import GRPOTrainer
    from slothrl.trainers.sft import SFTTrainer

_LAZY = {"GRPOTrainer": "slothrl.trainers.grpo", "SFTTrainer": "slothrl.trainers.sft"}

__all__ = ["GRPOTrainer", "SFTTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'slothrl' has no attribute {name!r}")

"""The README's table of exports: `python -m tests.integration.export_figures FOLDER` (about 2 minutes on a CPU).

The embedded SmolLM2 with a random adapter of r=16: each export is made in a process of its own, reloaded and compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slothrl.embedded import embedded_folder
from tests.export_models import adapted, make_adapter

ASKED = "What is 17 + 25? Explain each step, then give the answer."
SAID = "First add the tens: 10 + 20 = 30. Then add the ones: 7 + 5 = 12. Together 30 + 12 = 42."
EXPORTS = (
    ["peft"],
    ["merged", "--dtype", "bfloat16"],
    ["merged", "--dtype", "float16"],
    ["gguf", "--type", "f16"],
    ["gguf", "--type", "bf16"],
    ["gguf", "--type", "q8_0"],
)
# VmHWM and not getrusage, which counts the parent's memory at the fork too.
CHILD = """
import sys
from slothrl.__main__ import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


@torch.no_grad()
def main(folder: Path) -> None:
    """Export into `folder` and print one line an export: nat, nat, nat, MB."""
    folder.mkdir(parents=True, exist_ok=True)
    base = embedded_folder("smollm2")
    adapter = make_adapter(base, folder / "adapter", deviation=0.02, r=16, lora_alpha=32)
    messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    text = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False)
    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False).input_ids])
    reference = adapted(base, adapter)(ids).logits[0].log_softmax(-1)
    report("no adapter", AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), reference, ids)
    for words in EXPORTS:
        out = folder / "-".join(words).replace("--", "")
        command = ["export", str(adapter), "--format", words[0], "--out", str(out), "--force", *words[1:]]
        ran = subprocess.run([sys.executable, "-c", CHILD, *command], env=os.environ, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        if words[0] == "peft":
            model = adapted(base, out)
        else:
            file = {"gguf_file": f"model-{words[2]}.gguf"} if words[0] == "gguf" else {}
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **file)
        report(f"{' '.join(words)}, peak {int(ran.stdout.split()[-1]) // 1024} MB", model, reference, ids)


def report(name: str, model, reference: torch.Tensor, ids: torch.Tensor) -> None:
    found = model(ids).logits[0].log_softmax(-1)
    apart = (found - reference)[:-1].gather(1, ids[0, 1:, None]).abs()
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    print(f"{name}: largest {apart.max():.2g}, mean {apart.mean():.2g}, KL {kl:.2g}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One SFT step of QLoRA, a process an arm: slothrl (fused), by CUDA graphs too, unfused, transformers + PEFT, Unsloth.

    python -m slothrl bench step                                          # Llama-3-8B's shape, 2 x 2048 tokens
    python -m slothrl bench step --shape 0.6b --batch 8 --length 512      # Qwen3-0.6B's
    python -m slothrl bench step --arms slothrl,peft --length 8192 --batch 1

nf4 with double quantisation, LoRA r=16 on the seven linear layers with float32 weights under bf16 autocast, gradient
checkpointing, AdamW8bit (slothrl's in one launch), random weights and tokens, the same in every arm. A step is forward,
backward, optimizer; median of `--steps` after some to warm up, with and without the optimizer's; what is timed is what
was compared: every arm must have the first arm's loss and gradient norm after the former, as far as bf16 has them.
Graphs: slothrl with model.graphs=off, graphs with on, auto with auto.
Unsloth runs where it can be imported, through its public interface, from a checkpoint of the same weights on disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ARMS = ("slothrl", "graphs", "auto", "unfused", "peft", "unsloth")
WARM_UP = 6  # forwards and backwards before the first update: `auto` has its measurements and its graphs then
UPDATES = 3  # updates before the timing begins
COLUMNS = "arm, tok/s, ms a step, peak GiB allocated, reserved, loss, gradient norm"
LOSS_TOLERANCE = 5e-3  # of bf16 implementations that round in different places
NORM_TOLERANCE = 3e-2  # the same, of the gradient's norm


def main() -> int:
    parser = argparse.ArgumentParser(prog="slothrl bench step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=["8b", "0.6b", "tiny"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=7)
    policies = ["auto", "layer", "attention", "all", "offload", "both"]
    parser.add_argument("--activations", default="auto", choices=policies, help="model.activations of slothrl")
    parser.add_argument("--activation-gib", type=float, help="model.activation_gib of slothrl")
    parser.add_argument("--arms", help=f"of {','.join(ARMS)}; default: slothrl,graphs,peft, unsloth if installed")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    places = ["device", "host"]
    parser.add_argument("--embeddings", default="device", choices=places, help="model.embeddings of slothrl")
    parser.add_argument("--profile", action="store_true", help="also one step, kernel by kernel")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # set in the process of one arm
    arguments = parser.parse_args()
    if arguments.arm:
        print("RESULT " + json.dumps(run_arm(arguments)), flush=True)
        return 0
    arms = arguments.arms.split(",") if arguments.arms else ["slothrl", "graphs", "peft"]
    if not arguments.arms and importlib.util.find_spec("unsloth"):
        arms.append("unsloth")
    return compare(arms, arguments)


# --- the comparison -------------------------------------------------------------------------------------------------


def compare(arms: list[str], arguments: argparse.Namespace) -> int:
    shape = f"{arguments.shape} shape, {arguments.batch} x {arguments.length} tokens"
    ours = f"slothrl with model.activations={arguments.activations}"
    ours += "" if arguments.activation_gib is None else f" and model.activation_gib={arguments.activation_gib:g}"
    print(f"### SFT step, {shape}, nf4, LoRA r=16, {ours}\n", flush=True)
    results: dict[str, Any] = {}
    wrong = []
    for arm in arms:
        result = results[arm] = in_process(arm)
        first = next((r for r in results.values() if "loss" in r), {})
        if len(results) == 1:
            where = "; slothrl with model.embeddings=host" if arguments.embeddings == "host" else ""
            print(f"{first.get('device', '?')}, torch {first.get('torch', '?')}, {time.strftime('%Y-%m-%d')}{where}\n")
            print(f"| {' | '.join(COLUMNS.split(', '))} |\n{'|---' * 7}|")
        if "loss" not in result:
            print(f"| {arm} | FAILED: {result['error']} |", flush=True)
            wrong.append(arm)
            continue
        cells = [f"{result['tokens_per_second']:,.0f}", f"{result['ms']:.1f}", f"{result['allocated']:.2f}"]
        cells += [f"{result['reserved']:.2f}", f"{result['loss']:.4f}", f"{result['grad_norm']:.4f}"]
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)
        same = abs(result["loss"] - first["loss"]) <= LOSS_TOLERANCE * abs(first["loss"])
        same &= abs(result["grad_norm"] - first["grad_norm"]) <= NORM_TOLERANCE * first["grad_norm"]
        if not same or not result["grad_norm"] > 0:
            wrong.append(f"{arm} (it does not train what {arms[0]} trains)")
    for arm, result in results.items():
        print("".join(f"\nPROFILE {arm} {line}" for line in result.get("profile", [])), end="")
    for note in (f"{arm}: {result['note']}" for arm, result in results.items() if result.get("note")):
        print(f"\n{note}")
    print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nequal loss and an equal gradient norm in every arm")
    return 1 if wrong else 0


def in_process(arm: str) -> dict[str, Any]:
    """The arm's result, or {"error": its last line}."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
    child = subprocess.run(command, capture_output=True, text=True)
    for line in child.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(child.stderr[-3000:], file=sys.stderr)
    return {"error": (child.stderr.strip().splitlines() or ["no output"])[-1][:200]}


# --- one arm --------------------------------------------------------------------------------------------------------


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.arm == "unsloth":
        importlib.import_module("unsloth")  # before transformers, or it says so
    import torch

    cuda = arguments.device == "cuda"
    prepare = prepare_unsloth if arguments.arm == "unsloth" else prepare_ours
    model, loss_of, note = prepare(arguments)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(arguments.device)
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], cuda, arguments.arm)
    losses, norm, taken = timed_steps(model, loss_of, optimizer, ids, arguments)
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    if arguments.arm in ("graphs", "auto") and cuda:
        from slothrl.graphs import graphs_of

        note += f"; {graphs_of(model)}"
    profile = []
    if arguments.profile:
        from profiled import profile_lines

        profile = profile_lines(lambda: step(loss_of, optimizer, ids, arguments.device))
    return {
        "tokens_per_second": ids.numel() / taken,
        "ms": taken * 1e3,
        "allocated": peak[0] / 2**30,
        "reserved": peak[1] / 2**30,
        "loss": losses[0],
        "grad_norm": norm,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "note": note,
        "profile": profile,
    }


def timed_steps(
    model: Any, loss_of: Callable, optimizer: Any, ids: Any, arguments: argparse.Namespace
) -> tuple[list[float], float, float]:
    """(losses from the last one before any update on, that one's gradient norm, median seconds of a step)."""
    import torch

    cuda, losses, norms, seconds = arguments.device == "cuda", [], [], []
    for turn in range(WARM_UP + UPDATES + arguments.steps):
        if turn == WARM_UP + UPDATES and cuda:
            torch.cuda.reset_peak_memory_stats()
        wait(cuda)
        start = time.perf_counter()
        seen = (lambda: norms.append(grad_norm(model))) if turn == WARM_UP - 1 else None
        loss = step(loss_of, optimizer, ids, arguments.device, seen, update=turn >= WARM_UP)
        wait(cuda)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses[WARM_UP - 1 :], norms[0], median(seconds[-arguments.steps :])


def step(
    loss_of: Callable, optimizer: Any, ids: Any, device: str, seen: Callable | None = None, update: bool = True
) -> Any:
    """Forward, backward, optimizer where there is to be an update; `seen` is called while the gradients are there."""
    import torch

    with torch.autocast(device, torch.bfloat16):
        loss = loss_of(ids)
    loss.backward()
    if seen:
        seen()
    if update:
        optimizer.step()
    optimizer.zero_grad()
    return loss


def prepare_ours(arguments: argparse.Namespace) -> tuple[Any, Callable, str]:
    """slothrl, the same unfused, or transformers + PEFT, over one model made in memory."""
    from peft import LoraConfig, get_peft_model
    from random_models import LINEARS, random_model, randomize_adapter

    base = random_model(arguments.shape, arguments.device, arguments.length)
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
    randomize_adapter(model)
    ours, kept = arguments.arm in ("slothrl", "graphs", "auto"), (arguments.activations, arguments.activation_gib)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    if arguments.arm == "peft":
        return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, ""
    note, moved = "", []
    if ours and arguments.embeddings == "host":
        from slothrl.host_embeddings import move_embeddings

        moved = move_embeddings(model, "host")
    if ours:
        from slothrl.activations import keep_activations
        from slothrl.fuse import fuse
        from slothrl.graphs import graph_layers

        rows = fuse(model).rows() + keep_activations(model, *kept)
        rows += graph_layers(model, {"slothrl": "off", "graphs": "on"}.get(arguments.arm, "auto"))
        note = "; ".join(f"{what} {how}".strip() for what, how in (*moved, *rows))
    return model, lambda ids: streamed_loss(model, ids), note


def streamed_loss(model: Any, ids: Any) -> Any:
    """The same loss without logits: the next token's mean negative log-prob."""
    from slothrl.logprobs import head_spec, selective_logprobs

    base = model.get_base_model()
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    labels = ids[:, 1:].flatten()
    logprobs, _ = selective_logprobs(hidden.flatten(0, 1), labels, head_spec(model), with_entropy=False)
    return -logprobs.mean()


def prepare_unsloth(arguments: argparse.Namespace) -> tuple[Any, Callable, str]:
    """Unsloth through FastLanguageModel, with its own gradient checkpointing and loss."""
    from random_models import LINEARS, random_model, randomize_adapter, save_checkpoint
    from unsloth import FastLanguageModel  # pyright: ignore

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(random_model(arguments.shape, arguments.device, arguments.length), Path(folder))
        save_tokenizer(folder)
        length = arguments.length
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=length, load_in_4bit=True, dtype=None)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        target_modules=LINEARS,
        use_gradient_checkpointing="unsloth",
        max_seq_length=arguments.length,
    )
    randomize_adapter(model)
    model.train()
    return model, lambda ids: model(input_ids=ids, labels=ids).loss, ""


def save_tokenizer(folder: str) -> None:
    """Whatever passes for one: no text is ever read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "eos_token": "</s>", "bos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def optimizer_of(parameters: list, cuda: bool, arm: str) -> Any:
    """bitsandbytes' 8-bit AdamW; slothrl's is the same in one launch."""
    if cuda and arm in ("slothrl", "graphs", "auto"):
        from slothrl.flat_adamw import FlatAdamW8bit

        return FlatAdamW8bit(parameters, lr=1e-4)
    if cuda:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-4)
    from torch.optim import AdamW

    return AdamW(parameters, lr=1e-4)


def grad_norm(model: Any) -> float:
    return sum(p.grad.float().square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5


def wait(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

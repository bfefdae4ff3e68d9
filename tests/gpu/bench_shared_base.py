"""What sharing one base costs and saves on a GPU: prints tables, one a command.

python tests/gpu/bench_shared_base.py shape               # Llama-3-8B's shape, nf4: memory, push, sleep, probe
python tests/gpu/bench_shared_base.py logprobs DIR ...    # sampled log-probs against the trainer's, real models,
                                                           # by each way to generate (--arms, separated by ;)
python tests/gpu/bench_shared_base.py stress              # 1,000 push / generate / train cycles
python tests/gpu/bench_shared_base.py slope RUN           # memory over the steps of a finished run
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from slothrl.engine import Sampling, inference
from slothrl.lora_slot import lora_shape
from slothrl.probe import PolicyProbe, mean_difference, perturbed_lora
from slothrl.shared_model import SharedModel, empty_model
from tests.families import ROWS, make_checkpoint
from tests.gpu.random_checkpoint import write_random
from tests.helpers import tiny_tokenizer

MB = 1e6
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a sloth who learns to program.",
    "Explain how a bicycle stays upright.",
    "What is 17 times 23? Think step by step.",
    "Give me a recipe for pancakes.",
    "Who wrote Faust, and what is it about?",
    "List the planets of the solar system with one fact each.",
    "A train travels 120 km in 1.5 hours. How fast is it?",
)


def used() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def milliseconds(call: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def start(folder: str, quantization: str | None, rank: int, **options):
    """(engine, shared base, empty_model's bytes on the device, LoRA config)."""
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    torch.manual_seed(0)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    outline = get_peft_model(empty_model(folder, torch.float32), adapter, low_cpu_mem_usage=True)
    empty = empty_model(folder, torch.bfloat16)
    engine = VLLMEngine(VLLMOptions(folder, quantization=quantization, **options), lora_shape(outline))
    return engine, empty, adapter


# --- the 8B shape ---------------------------------------------------------------------------------------------------


def shape(arguments: argparse.Namespace) -> None:
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 20e9
    parent = str(memory) if roomy else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        begin = time.perf_counter()
        write_random(Path(folder))
        print(f"checkpoint written in {time.perf_counter() - begin:.0f} s", flush=True)
        _shape(folder, arguments)


def _shape(folder: str, arguments: argparse.Namespace) -> None:
    torch.cuda.init()
    nothing = used()
    options = {"max_model_len": 2048, "max_num_seqs": 64, "kv_cache_gb": arguments.kv, "gpu_memory_utilization": 0.6}
    begin = time.perf_counter()
    engine, empty, adapter = start(folder, "bitsandbytes", 16, enforce_eager=True, **options)
    alone = used()
    print(f"vLLM started in {time.perf_counter() - begin:.0f} s, {(alone - nothing) / MB:,.0f} MB", flush=True)
    shared = SharedModel(engine.vllm_model, empty)
    both = used()
    parameters = sum(1 for _ in shared.model.parameters())
    rows = [("base, bytes once", f"{shared.base_bytes / MB:,.0f} MB")]
    share = (both - alone) / shared.base_bytes
    rows.append(("trainer's model beside vLLM", f"{(both - alone) / MB:,.1f} MB = {share:.2%} of the base"))
    rows.append(("parameters outside vLLM's bytes", f"{len(shared.own_parameters())} of {parameters}"))
    model = get_peft_model(shared.model, adapter)
    rows.append(("LoRA r=16 on 7 projections, float32", f"{(used() - both) / MB:,.0f} MB"))
    engine.follow(model, tiny_tokenizer())
    engine.push_lora()
    pushed = milliseconds(engine.slot.push, 50)
    whole = milliseconds(engine.push_lora, 20)
    rows.append(("push of A and B", f"{statistics.median(pushed):.2f} ms median, {max(pushed):.2f} worst of 50"))
    rows.append(("push_lora with both synchronisations and cache reset", f"{statistics.median(whole):.2f} ms median"))
    probe = PolicyProbe(engine, model, [[(7 * i * i + 5) % 90000 + 9 for i in range(64)]] * 4, bound=1.0)
    print(f"probe difference {probe.check():.4f}", flush=True)
    for name, check in {"probe, 24 tokens": lambda: probe._check([probe._short_row()]), "4 x 64": probe.check}.items():
        rows.append((name, f"{statistics.median(milliseconds(check, 10)):.1f} ms median"))
    checksum = shared.checksum()
    before = used()
    slept, woken = [], []
    for _ in range(8):
        slept += milliseconds(engine.sleep, 1)
        asleep = used()
        woken += milliseconds(engine.wake, 1)
    rows.append((f"sleep, {engine.holdings()['KV cache'] / 2**30:.1f} GiB of KV", f"{_spread(slept)}"))
    rows.append(("wake", _spread(woken)))
    rows.append(("driver before, asleep, awake", f"{before / MB:,.0f}, {asleep / MB:,.0f}, {used() / MB:,.0f} MB"))
    _train(model, rows)
    rows.append(("base unchanged after all", str(shared.checksum() == checksum)))
    engine.sleep()
    before = used()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    second = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0}
    )
    rows.append(("a base of the trainer's own would take", f"{(used() - before) / MB:,.0f} MB"))
    del second
    show(rows)


def _train(model, rows: list[tuple[str, str]]) -> None:
    import bitsandbytes as bnb

    model.get_base_model().gradient_checkpointing_enable()
    model.get_base_model().enable_input_require_grads()
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 100000, (1, 512), device="cuda")
    losses = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    rows.append(("three training steps with 8-bit AdamW", f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"))


def _spread(found: list[float]) -> str:
    return f"{statistics.median(found):.1f} ms median, {max(found):.1f} worst of {len(found)}"


# --- log-probs of sampled tokens ------------------------------------------------------------------------------------


NF4 = {"quantization": "bitsandbytes"}
GENERATING: dict[str, dict] = {
    "bf16, vLLM's layers": {"quantization": None, "linear": "vllm"},
    "nf4, vLLM's bitsandbytes": {**NF4, "linear": "vllm"},
    "nf4, our layers": {**NF4, "linear": "slothrl"},
    "nf4, our layers, 16-bit view": {**NF4, "linear": "slothrl", "view": True, "sleep": False},
    "nf4, our layers, FP8 KV cache": {**NF4, "linear": "slothrl", "kv_cache_dtype": "fp8"},
}


def logprobs(arguments: argparse.Namespace) -> None:
    rows = []
    for folder in arguments.folders:
        for arm in arguments.arms.split(";"):
            rows += _logprobs(folder, arm)
    show(rows)


def _logprobs(folder: str, arm: str) -> list[tuple[str, str]]:
    options = {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_gb": 1.0, "gpu_memory_utilization": 0.1}
    engine, empty, adapter = start(folder, rank=16, enforce_eager=True, **options, **GENERATING[arm])
    shared = SharedModel(engine.vllm_model, empty)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(shared.model, adapter)
    engine.follow(model, tokenizer)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in QUESTIONS
    ] * 8
    found = []
    # With a LoRA that does something, of a size that training reaches.
    with perturbed_lora(model, 0.002):
        engine.push_lora()
        for temperature in (1.0, 0.7):
            sampling = Sampling(64, temperature, extra={"ignore_eos": True, "stop_token_ids": [], "seed": 0})
            rollout = engine.generate(prompts, sampling)
            gaps = []
            with inference(model):
                for prompt, ids, sampled in zip(
                    prompts, rollout.completion_ids, rollout.sampling_logprobs, strict=True
                ):
                    row = torch.tensor([list(prompt) + ids], device="cuda")
                    with torch.autocast("cuda", torch.bfloat16):
                        logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1]
                    expected = (logits.float() / temperature).log_softmax(-1).gather(-1, row[0, len(prompt) :, None])
                    gaps.append((expected[:, 0].cpu() - torch.tensor(sampled)).abs())
            gap = torch.cat(gaps)
            name = f"{Path(folder).name}, {arm}, T={temperature}"
            value = (
                f"{gap.numel()} tokens: mean {gap.mean():.4f}, p99 {gap.quantile(0.99):.3f}, max {gap.max():.3f} nat"
            )
            found.append((name, value))
            print(name, value, flush=True)
    engine.close()
    return found


# --- stress ---------------------------------------------------------------------------------------------------------


def stress(arguments: argparse.Namespace) -> None:
    import bitsandbytes as bnb

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("llama", Path(folder))
        options = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_gb": 1.0, "gpu_memory_utilization": 0.05}
        engine, empty, adapter = start(folder, "bitsandbytes", 8, enforce_eager=arguments.eager, **options)
        shared = SharedModel(engine.vllm_model, empty)
        model = get_peft_model(shared.model, adapter)
        engine.follow(model, tiny_tokenizer())
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = bnb.optim.AdamW8bit(weights, lr=1e-4, min_8bit_size=16)
        checksum, memory, worst = shared.checksum(), [], 0.0
        probe = PolicyProbe(engine, model, ROWS[:1], bound=0.5)
        begin = time.perf_counter()
        for cycle in range(arguments.cycles):
            engine.push_lora()
            worst = max(worst, probe.check())
            rollout = engine.generate([ROWS[0]] * 8, Sampling(max_tokens=8))
            engine.sleep()
            ids = torch.tensor([ROWS[0] + (c + [1] * 8)[:8] for c in rollout.completion_ids], device="cuda")
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            if cycle >= 50 and cycle % 50 == 0:
                memory.append(used())
        seconds = time.perf_counter() - begin
        show(
            [
                ("cycles", f"{arguments.cycles} in {seconds:.0f} s, graphs {'off' if arguments.eager else 'on'}"),
                ("base's checksum unchanged", str(shared.checksum() == checksum)),
                ("worst probe difference", f"{worst:.4f} nat"),
                ("driver, first, last, range", f"{memory[0]}, {memory[-1]}, {max(memory) - min(memory)} bytes"),
                ("final difference", f"{mean_difference(*_both(engine, model)):.4f} nat"),
            ]
        )
        assert shared.checksum() == checksum


def _both(engine, model):
    from slothrl.engine import model_logprobs

    engine.push_lora()
    return engine.logprobs(ROWS), model_logprobs(model, ROWS)


def show(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"| {name:{width}} | {value} |" for name, value in rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (shape, logprobs, stress):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        if function is shape:
            command.add_argument("--kv", type=float, default=30.0, help="KV cache in GiB")
        if function is logprobs:
            command.add_argument("folders", nargs="+")
            command.add_argument("--arms", default=";".join(GENERATING))
        if function is stress:
            command.add_argument("--cycles", type=int, default=1000)
            command.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()

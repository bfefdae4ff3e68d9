#!/bin/sh
# All that a GRPO step is measured by on a GPU, the most telling first: sh tests/gpu/measure_grpo.sh [FOLDER]
# Times are an H100's. $PYTHON runs it (default: python). Each command writes FOLDER/NAME.log (default: measured/) and the next one runs whatever came of it.
out=${1:-measured}
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH=".:kernels:rewards${PYTHONPATH:+:$PYTHONPATH}"

measure() {
    name=$1
    shift
    begin=$(date +%s)
    "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "$name: exit code $code, $(($(date +%s) - begin)) s"
    grep -E '^\||^MEMORY|times our|^failed|^the same|in all;|passed|FAILED|^E  ' "$out/$name.log" | tail -n 30
}

fused="packed, fused layers"
kept="packed, fused layers, attention kept"
# 150 s. A table of four steps and their median, the phases' memory, "every demand is met" (update at most 6.5 s, the rest
# 0.5 s, 30 GB, a gradient, an importance ratio near 1). Where the probe refuses random weights: rollout.probe=false.
measure full "$python" tests/gpu/bench_grpo_full.py
# 90 s. The update alone: about 6.1 s fused, 69,504 tokens in 4 micro-batches; MEMORY: KB a token kept and at the most;
# "the same gradient in every arm": what fused and plain layers train on must be one thing.
measure main "$python" tests/gpu/bench_grpo_step.py --shapes main --arms "$fused;$kept;packed"
# 90 s. 8 completions of 20,480 tokens: at most 16 GB beyond the base, about 13 computed.
measure long-completion "$python" tests/gpu/bench_grpo_step.py --shapes long-completion --arms "$fused"
# 150 s. Ours beside both peers at prompt 2,048: "times our seconds", TRL at least 4, Unsloth 2.5.
measure long-prompt "$python" tests/gpu/bench_grpo_step.py --shapes long-prompt --arms "$fused" --peers
# 330 s. The same at prompt 504 and completion 1,024: TRL at least 5, Unsloth 1.6. TRL takes about 40 s a step.
measure peers "$python" tests/gpu/bench_grpo_step.py --shapes main --arms "$fused" --peers
# 90 s. Pairs by error budget: packed and padded, shared, cut, fused, dropped, elided, siblings.
measure pairs "$python" -m pytest -q -m gpu tests/gpu/test_packed_step_gpu.py tests/gpu/test_packed_pairs_gpu.py
# 90 s. What packing and sharing are worth without fused layers.
measure arms "$python" tests/gpu/bench_grpo_step.py --shapes main --arms "packed, prompts not shared;padded"

#!/bin/sh
# What is to be measured of memory and of going on, on an H100 for itself alone, each under 2 minutes, in the order of
# worth: `sh tests/gpu/measure_fit.sh FOLDER [NUMBER …]`, from the repository's root. Logs go to FOLDER.
#
#   1  bench_fit.py, nothing fused   predicted against measured: 14 rows, "allocated" and "driver" within 10 % in each
#   2  bench_fit.py, fused           3 rows; those of SFT within 10 %, a packed GRPO update is in question
#   3  test_resume_gpu.py, SFT       1 passed; prints where it was killed and how many losses are equal to the bit
#   4  bench_presets.py, small cards 8gb, 12gb, 16gb: "of the card" under 100 % twice a row, no "**no**"; largest pack
#      beside the predicted one
#   5  test_resume_gpu.py, vLLM      1 passed: the same prompts, losses within 0.05
#   6  bench_fit_vllm.py             4 rows (two models, two phases) within 10 %
#   7  bench_presets.py, 24gb, 80gb  as 4
#   8  test_resume_gpu.py, GRPO with transformers' generate   1 passed: the same prompts, losses within 2 % and 0.001
set -u
out=$1
shift
mkdir -p "$out"
export PYTHONPATH=".:kernels:rewards${PYTHONPATH:+:$PYTHONPATH}"
run() {
    number=$1 name=$2
    shift 2
    case " $wanted " in *" $number "*) ;; *) return ;; esac
    echo "== $number $name: $*"
    timeout 240 "$@" >"$out/fit-$number-$name.log" 2>"$out/fit-$number-$name.err" && code=0 || code=$?
    grep -v transformers "$out/fit-$number-$name.log"
    [ "$code" = 0 ] || { echo "exit code $code"; tail -20 "$out/fit-$number-$name.err"; }
}
wanted=${*:-1 2 3 4 5 6 7 8}
tests=tests/gpu/test_resume_gpu.py
run 1 plain python tests/gpu/bench_fit.py --without fused
run 2 fused python tests/gpu/bench_fit.py --only fused
run 3 resume-sft python -m pytest -q -s -m gpu $tests -k test_sft
run 4 presets python tests/gpu/bench_presets.py 8gb 12gb 16gb --out "$out/presets-small.md"
run 5 resume-vllm python -m pytest -q -s -m gpu $tests -k vllm
run 6 vllm python tests/gpu/bench_fit_vllm.py
run 7 presets python tests/gpu/bench_presets.py 24gb 80gb --out "$out/presets-large.md"
run 8 resume-grpo python -m pytest -q -s -m gpu $tests -k with_transformers

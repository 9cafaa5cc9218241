#!/usr/bin/env bash
# The goals, all checks and the most important tables on a GPU, in three commands of less than ten minutes each:
#
#     bash evals/gpu_session.sh 1 [WHEELS]     goals; every check; a step of QLoRA beside plain PEFT's
#     bash evals/gpu_session.sh 2 [WHEELS]     GPTQ of OPT-6.7B's shape: two blocks, then all of it, and beside that the checks of quanto
#     bash evals/gpu_session.sh 3 [WHEELS]     the end of that; kernels one by one; tables of inference and training
#
# WHEELS is a folder that gpu_wheels.py filled (.whl); without one the packages must be there. For a machine without a network, where a
# command may take ten minutes and $OUT alone, of 8 files at most, comes back: every driver writes as it goes and has a budget. What an earlier part has found is taken up again from evals/results, where it was put.
#
# Environment: OUT, where results go (out/gpu); PYTHON (python3); LIMIT, the seconds of a part (480: three of them, the machine's start and
# transfers are half an hour); STATE, a folder that outlives a command but not the machine (/tmp/qlm-gpu-session); DRY=1, the same commands on a CPU with tiny shapes, which tests this script.
set -uo pipefail

usage() {
    echo "usage: bash evals/gpu_session.sh 1|2|3 [WHEELS]" >&2
    exit 2
}

[[ ${1:-} =~ ^[123]$ && $# -le 2 ]] || usage
part=$1 wheels=${2:-.whl}
cd "$(dirname "$0")/.." || exit
export OUT=${OUT:-$PWD/out/gpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-480} STATE=${STATE:-/tmp/qlm-gpu-session} DRY=${DRY:-}
log=$OUT/log-$part.txt
mkdir -p "$OUT" "$STATE"

device=cuda
tables=(evals/gpu_tables.py)
finetune=(evals/finetune_speed.py pythia-1.4b --device cuda --precision bfloat16 --gradient-checkpointing
    --batch-size 4 --length 512 --steps 20 --rounds 1 --threads 8)
quantize=(evals/quantize_speed.py opt-6.7b --device cuda --samples 128 --length 2048 --repeats 1 --threads 8)
blocks=2
# Texts of gpu_check's --only, one process each: together they name every check. Most of the time goes into compiling kernels, on one core.
checks=("kernels gptq 2-bit" "kernels gptq 3-bit" "kernels gptq 4-bit" "kernels gptq 8-bit" "kernels int8" "repeated" "op " "module "
    "model opt" "model neox" "model bigcode" "flash " "text " "bench " "train " "quantize columns" "quantize opt" "quantize neox" "quantize bigcode")
if [[ $DRY ]]; then
    device=cpu
    tables+=(--device cpu --shapes tiny)
    finetune=(evals/finetune_speed.py tiny --steps 3 --warm-up 1 --rounds 1 --length 16 --r 2 --threads 1)
    quantize=(evals/quantize_speed.py tiny --samples 4 --length 32 --repeats 1 --threads 1)
    blocks=1
    checks=("op nf4" "flash ")
fi

say() { echo "== $SECONDS s: $*" | tee -a "$log"; }

left() { echo $((LIMIT - SECONDS)); }

# least A B: the smaller number.
least() { echo $(($1 < $2 ? $1 : $2)); }

# within SECONDS COMMAND...: what the command prints goes to the log too; it is ended after so many seconds, or when the part has to end.
within() {
    local most
    most=$(least "$1" "$(left)")
    shift
    if ((most < 5)); then
        say "left out, the time being over: $*"
        return
    fi
    say "$*"
    # SIGTERM first: drivers clear their folders away then.
    timeout -k 5 "$most" "$@" 2>&1 | tee -a "$log"
    say "exit code ${PIPESTATUS[0]}"
}

# install_into FOLDER WHEEL...: beside the machine's own packages; once, as long as the machine stays.
install_into() {
    local site=$1
    shift
    [[ -e $site.complete ]] && return
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$@" 2>&1 | tee -a "$log"
    ((PIPESTATUS[0] == 0)) || exit 1
    touch "$site.complete"
}

# What the machine lacks, from wheels alone. quanto has a folder of its own: its qint4 compiles an extension when it is first used, for a
# minute or more, and each process that comes to it would wait.
packages() {
    local most=() quanto=() wheel
    for wheel in "$wheels"/*.whl; do
        case $wheel in
        */optimum_quanto-*) quanto+=("$wheel") ;;
        *) [[ -e $wheel ]] && most+=("$wheel") ;;
        esac
    done
    if ((${#most[@]} == 0)); then
        say "no wheels in $wheels: with what is installed"
        return
    fi
    install_into "$STATE/site" "${most[@]}"
    ((${#quanto[@]})) && install_into "$STATE/quanto" "${quanto[@]}"
    export PYTHONPATH=$STATE/site
}

# qlm ARGUMENT...: the command line of this checkout, which need not be installed.
qlm() {
    within 60 "$PYTHON" -c 'import sys
sys.path[:0] = ["evals"]
from shared import use_checkout
use_checkout()
from qlm.cli import main
main(sys.argv[1:])' "$@" --device "$device"
}

# What is there, whether a kernel of Triton's and one of bitsandbytes' run at all, and what a user would call first.
look() {
    df -h "$STATE" "$OUT" 2>&1 | tee -a "$log"
    nproc | tee -a "$log"
    free -g 2>/dev/null | head -2 | tee -a "$log"
    [[ $DRY ]] || look_at_the_gpu
    qlm bench evals/checkpoints/tiny-opt --prompt 64 --new 32 --repeats 2
    qlm generate evals/checkpoints/tiny-opt --prompt "The city was" --max-new-tokens 32 --greedy
}

look_at_the_gpu() {
    nvidia-smi -L 2>&1 | tee -a "$log"
    within 60 "$PYTHON" -c '
import sys
sys.path[:0] = ["evals"]
from shared import use_checkout, versions
use_checkout()
print(versions())
import torch, bitsandbytes
from qlm.kernels import ops
print(torch.cuda.get_device_name(), torch.version.cuda, [ops.kernel(op, "cuda") for op in ("gptq_linear", "int8_linear", "nf4_linear")])
linear = bitsandbytes.nn.Linear4bit(128, 128, quant_type="nf4").cuda()
print("bitsandbytes", linear(torch.ones(1, 128, device="cuda")).shape)'
}

# Every check, a process for each text, and one report of all.
check() {
    local most=$1 number=0 pids=()
    most=$(least "$most" $(($(left) - 15)))
    if ((most < 20)); then
        say "left out, the time being over: gpu_check"
        return
    fi
    rm -rf "$STATE/check" && mkdir -p "$STATE/check"
    say "gpu_check, ${#checks[@]} processes, $most s"
    for text in "${checks[@]}"; do
        number=$((number + 1))
        # A check that began in time may still take a while.
        OMP_NUM_THREADS=1 timeout -k 5 "$most" "$PYTHON" evals/gpu_check.py --device "$device" --only "$text" --seconds $((most * 4 / 5)) \
            --out "$STATE/check/$number.json" 2>&1 | sed -u "s/^/$text: /" >>"$OUT/check.txt" &
        pids+=($!)
    done
    wait "${pids[@]}"
    grep FAILED "$OUT/check.txt" | head -n 40 | tee -a "$log"
    if compgen -G "$STATE/check/*.json" >/dev/null; then
        within 60 "$PYTHON" evals/gpu_check.py --merge "$STATE"/check/*.json
    fi
}

# Those of quanto, one process, and a report of them and of what part 1 found.
check_quanto() {
    local most=$1
    [[ -e $STATE/quanto.complete ]] || return
    mkdir -p "$STATE/check"
    # It compiles while GPTQ's checkpoint is drawn and written, and leaves it cores.
    within "$most" nice env MAX_JOBS=6 OMP_NUM_THREADS=1 PYTHONPATH="$STATE/quanto:${PYTHONPATH:-}" "$PYTHON" evals/gpu_check.py \
        --device "$device" --only quanto --seconds $((most * 4 / 5)) --out "$STATE/check/quanto.json"
    # By name the last of them: it replaces those that had no package.
    if [[ -e $STATE/check/quanto.json ]]; then
        within 60 "$PYTHON" evals/gpu_check.py --merge "$STATE"/check/*.json
    fi
}

# What an earlier part found: figures that are there are not measured again, and go back with the new ones.
take_up() {
    local file
    for file in evals/results/"$1"-*.json; do
        [[ -e $file && ! -e $OUT/${file##*/} ]] && cp "$file" "$OUT/"
    done
}

# All blocks may take longer than a command may: they go on behind it, in a session of their own, and part 3 looks what has become of them.
quantize_behind() {
    local place=$STATE/quantize
    rm -rf "$place" && mkdir -p "$place"
    setsid nohup "$PYTHON" "${quantize[@]}" --out "$place" >"$place/quantize-log.txt" 2>&1 </dev/null &
    echo $! >"$STATE/quantize.pid"
    say "behind: ${quantize[*]}"
}

# wait_for_quantize SECONDS: or less, if it is over; then brings what there is.
wait_for_quantize() {
    local end=$((SECONDS + $1))
    [[ -e $STATE/quantize.pid ]] || return
    while ((SECONDS < end)) && kill -0 "$(cat "$STATE/quantize.pid")" 2>/dev/null; do
        sleep 1
    done
    cp "$STATE"/quantize/* "$OUT/"
    tail -n 5 "$OUT/quantize-log.txt" | tee -a "$log"
}

part_1() {
    look
    take_up gpu_tables
    within 165 "$PYTHON" "${tables[@]}" --part goals --seconds 140
    check 115
    within 130 "$PYTHON" "${finetune[@]}"
}

part_2() {
    within 120 "$PYTHON" "${quantize[@]}" --blocks "$blocks"
    quantize_behind
    check_quanto 150
    wait_for_quantize $(($(left) - 5))
}

part_3() {
    wait_for_quantize "$(least 150 "$(left)")"
    # Nothing may run beside what is timed now. How far it came is in what was brought.
    [[ -e $STATE/quantize.pid ]] && kill "$(cat "$STATE/quantize.pid")" 2>/dev/null && say "GPTQ ended before it was over" && sleep 3
    rm -f "$STATE/quantize.pid"
    take_up gpu_kernels
    take_up gpu_tables
    # One dtype: the other has the same speed.
    within 100 "$PYTHON" evals/gpu_kernels.py --models opt-350m,pythia-6.9b --dtypes float16 --missing --seconds 80
    if [[ $DRY ]]; then
        within 60 "$PYTHON" "${tables[@]}" --part training --missing
        return
    fi
    within $(($(left) - 110)) "$PYTHON" "${tables[@]}" --part inference --shapes opt-350m --missing --seconds $(($(left) - 135))
    within "$(left)" "$PYTHON" "${tables[@]}" --part training --shapes opt-350m --missing --seconds $(($(left) - 25))
}

: >"$log"
packages
"part_$part"
say "part $part is over"
ls -l "$OUT"

#!/bin/bash
# One of the runs behind docs/performance.md:
#
#     bash benchmarks/performance.sh STORES OUT training|parts|embedding|profile|ranks|axes RUN
#
# STORES is a folder with the stores onek1k_1000g, pbmc3k and heart_san; OUT gets WHAT_RUN.json, its CSV, and pictures. The machine
# should do nothing else: on two cores a round of all takes half an hour.
set -eu
[ $# -eq 4 ] || { sed -n '2,7s/^# \?//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
case $3 in training | parts | embedding | profile | ranks | axes) ;; *) echo "performance.sh: $3 is none of training, parts, embedding, profile, ranks and axes." >&2; exit 2 ;; esac
mkdir -p "$2"
out=$(cd "$2" && pwd) what=$3 run=$4
cd "$1"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

embed() { # STORE GENES CELLS WARMUP STEPS
    python "$here/rivals.py" --tasks embedding --store "$1" --genes "$2" --batch-cells "$3" --warmup "$4" --steps "$5" \
        --implementations plain_bucketed plain_matmul scbench --json "$out/embedding_$1_$run.json" --plots "$out/embedding_$1_$run"
}
vary() { # OPTION VALUES
    local name=${1#--}; name=by_${name//-/_}_$run
    python "$here/throughput.py" --structures transformer linear --tasks training --warmup 1 --steps 3 "$@" \
        --json "$out/$name.json" --plots "$out/$name"
}

case $what in
training)
    python "$here/rivals.py" --tasks training --implementations reference plain_padded plain_matmul scbench --warmup 1 --steps 3 \
        --json "$out/training_$run.json" --plots "$out/training_$run" ;;
parts) python "$here/throughput.py" --store pbmc3k --warmup 2 --steps 6 --json "$out/parts_$run.json" --plots "$out/parts_$run" ;;
embedding)
    embed onek1k_1000g 512 64 2 6
    embed pbmc3k 1024 32 1 3
    embed heart_san 2048 16 1 3 ;;
profile) python "$here/step_profile.py" --warmup 2 --steps 5 --json "$out/profile_$run.json" --plots "$out/profile_$run" ;;
ranks)
    OMP_NUM_THREADS=1 deepspeed --num_accelerators 2 --no_local_rank "$here/throughput.py" --structures transformer linear \
        --tasks training --deepspeed zero0 zero1 zero2 zero3 --warmup 1 --steps 3 --json "$out/ranks_$run.json" ;;
axes)
    vary --widths 128 256 512
    vary --layers 3 6 12
    vary --genes 128 512 1024
    vary --batch-cells 8 32 128 ;;
esac

#!/usr/bin/env bash
# The first twenty minutes on one card: what is written for GPUs runs there, and how fast.
#
#   bash tests/gpu.sh A          kernels against references, tests/test_gpu.py, training: under ten minutes
#   bash tests/gpu.sh B          the programs, benchmarks, tiles, decoding: under ten minutes
#   bash tests/gpu.sh dry        every stage of both in tiny shapes on a CPU, to find mistakes before a GPU is there
#
# Each stage has a limit of its own and a failure stops no other. $OUT (default gpu_out) gets each stage's log
# and table.md. PYTHON: the interpreter (default python3). torch, Triton,
# NumPy, safetensors and pytest are needed. The ranges expected are for an H100 SXM or an H200; they are
# estimates, from the arithmetic of the kernels and figures that others have published: nothing was measured.
set -u
cd "$(dirname "$0")/.." || exit 2
PART=${1:-}
case $PART in A | B | dry) ;; *) sed -n '2,6s/^# \{0,1\}//p' tests/gpu.sh; exit 2 ;; esac
OUT=${OUT:-gpu_out} PY=${PYTHON:-python3} FAILED=0 DRY=() TINY=() ENV=(PYTHONUNBUFFERED=1)
if [ "$PART" = dry ]; then
    DRY=(--dry) TINY=(--tiny) ENV+=(CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TRITON_INTERPRET=1)
elif ! $PY -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU here: bash tests/gpu.sh dry runs every stage on a CPU" >&2
    exit 2
fi
mkdir -p "$OUT"
printf '\n## %s, %s\n' "$PART" "$(date -u '+%F %T')" >> "$OUT/table.md"

# stage NAME SECONDS EXPECTED LOOK COMMAND…: run it, show its output, append its rows ("| … |") to the table
stage() {
    local name=$1 limit=$2 expected=$3 look=$4 begin=$SECONDS said
    shift 4
    printf '\n== %s: at most %s s\n   expected: %s\n   if not:   %s\n' "$name" "$limit" "$expected" "$look"
    env "${ENV[@]}" timeout -s INT -k 20 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    case $code in
        0) said=ok ;;
        124 | 137) said="cut off after $limit s" ;;
        *) said="exit code $code" ;;
    esac
    [ "$code" = 0 ] || FAILED=$((FAILED + 1))
    {
        printf '\n### %s: %s, %s s\n\nexpected: %s\n\n' "$name" "$said" $((SECONDS - begin)) "$expected"
        awk '/^\|/ { if (row) { if (/^\| ---/) print ""; print row } row = $0 } END { print row }' "$OUT/$name.log"
    } >> "$OUT/table.md"
    echo "   $name: $said, $((SECONDS - begin)) s"
}

part_a() {
    stage machine 40 \
        "copy ≥ 2.6 TB/s (H100), ≥ 3.8 (H200); products 600 to 800 TFLOP/s" \
        "another program on the card, or its clocks (nvidia-smi -q -d CLOCK)" \
        "$PY" tests/gpu.py machine "${DRY[@]}"
    local skip=() beside=()  # in the dry form: make test runs these tests anyway
    [ "$PART" != dry ] || skip=(--version)
    ! "$PY" -c 'import xdist' 2> /dev/null || beside=(-n 8)  # some 270 kernels, each compiled for a second or two
    stage kernels 150 \
        "all pass" \
        "one dtype fails: its BAR; one shape: tile borders; all: TILES that this chip does not take" \
        "$PY" -m pytest -q -p no:cacheprovider tests/test_kernels.py -k "cuda or on_the_card" "${beside[@]}" "${skip[@]}"
    stage gpu-tests 90 \
        "all pass" \
        "graphs: capture() in sample.py; log-probabilities: decode_attention; FSDP2: apply_fsdp()" \
        "$PY" -m pytest -q -p no:cacheprovider tests/test_gpu.py -k "not stage" "${skip[@]}"
    # 1B has 9.0 GFLOP per token at 8k: of 989 TFLOP/s, 1 % is 1,100 tokens/s
    stage training 230 \
        "eager 38 to 45 % MFU, compiled 3 to 5 points more, recomputed a quarter less; memory within 10 % of plan" \
        "MFU: attention first (part B), then torch.profiler; memory: torch.cuda.memory._dump_snapshot" \
        "$PY" tests/gpu.py training "${DRY[@]}"
}

part_b() {
    local work
    work=$(mktemp -d)  # some 50 GB
    stage programs 210 \
        "143 after SIGTERM, the same command goes on; 15 GB saved in 10 to 30 s; free memory that does not shrink" \
        "its logs; free memory that shrinks: what Adam and the update keep allocated" \
        "$PY" tests/gpu.py programs "${DRY[@]}" --out "$work"
    cp "$work"/*.log "$OUT" 2> /dev/null
    rm -rf "$work"
    # Published, forward, 8k, head_dim 64 and 128: Triton 401, 392 to 464; FA2 322, 370; FA3 496, 646 TFLOP/s
    stage kernel-bench 90 \
        "attention forward ≥ 320 (64), ≥ 370 (128) TFLOP/s, both ways ≥ 250; the others ≥ 0.8 of a copy" \
        "attention: tiles (next stage); the others: loads of 16 bytes in the SASS (--resources)" \
        "$PY" tests/bench_kernels.py --quick "${TINY[@]}"
    stage tune 180 \
        "the tiles of FIRST 5 to 15 % faster than those in use" \
        "the fastest go into model.py, TILES; then --resources and the tests again" \
        "$PY" tests/bench_kernels.py --tune --quick "${TINY[@]}"
    stage decode 90 \
        "≥ 0.6 of what a copy reaches; the long tail ≥ 3 times generate" \
        "is a graph replayed? (Rollout.use_graphs); else decode in the stage before" \
        "$PY" tests/bench_rl.py --quick "${TINY[@]}"
}

case $PART in A) part_a ;; B) part_b ;; dry) part_a && part_b ;; esac
printf '\nrows: %s/table.md; stages that failed: %s\n' "$OUT" "$FAILED"
exit $((FAILED > 0))

#!/bin/sh
# Our server, eager and with compiled steps, and the peers under the same load, shape by shape; under 20 minutes in all on
# a quiet machine. Where the peers are: peers.md; one whose variable is empty is left out. Tables go to $OUT.
#   TRANSFORMERS=.venv-tf/bin/transformers VLLM=.venv-vllm/bin/vllm LLAMA_SERVER=build/bin/llama-server THREADS=1 \
#       sh benchmarks/peers.sh [SHAPE...]
# MODELS holds the checkpoints and, for llama.cpp, SHAPE.gguf beside them.
set -eu
cd "$(dirname "$0")/.."
threads=${THREADS:-1} models=${MODELS:-build/models} out=${OUT:-build/peers}
scenarios=${SCENARIOS:-one_client sixteen_clients four_long_prompts shared_prefix}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
for shape in ${*:-llama-135m qwen-0.5b}; do
    # Output lengths: enough tokens to time the fast ones by, few enough to wait for the slow ones.
    case $shape in *0.5b) scale=0.25 ;; *) scale=0.5 ;; esac
    set -- --server ours --server 'ours-compiled=--torch-compile True'
    [ -z "${TRANSFORMERS:-}" ] || set -- "$@" --server "tf-cb=$TRANSFORMERS serve --continuous-batching --device cpu \
        --dtype bfloat16 --host 127.0.0.1 --port {port} {model}"
    [ -z "${VLLM:-}" ] || set -- "$@" --server "vllm=$VLLM serve {model} --host 127.0.0.1 --port {port} \
        --dtype bfloat16 --max-model-len 4096 --max-num-seqs 32"
    [ -z "${LLAMA_SERVER:-}" ] || set -- "$@" --server "llama.cpp=$LLAMA_SERVER -m {model}.gguf --host 127.0.0.1 \
        --port {port} -np 16 -c 32768 --kv-unified -t $threads -tb $threads"
    # shellcheck disable=SC2086
    .venv/bin/python -m benchmarks.compare "$shape" "$@" --threads "$threads" --models "$models" --settle 240 \
        --length-scale "$scale" --scenarios $scenarios --json "$out/$shape.json" | tee "$out/$shape.md"
done

#!/bin/sh
# Our server, eager and with compiled steps, and the peers under the same load, shape by shape: about 20 minutes a shape
# on a quiet machine, half of them the starts of transformers serve and vLLM and what our first start compiles.
#   TRANSFORMERS=.venv-tf/bin/transformers VLLM=.venv-vllm/bin/vllm LLAMA_SERVER=build/bin/llama-server THREADS=1 \
#       sh benchmarks/peers.sh [SHAPE...]
# How the peers are installed is in peers.md. SERVERS names those to run, the first of them twice; MODELS holds the
# checkpoints and, for llama.cpp, SHAPE.gguf beside them; tables and numbers go to OUT.
set -eu
cd "$(dirname "$0")/.."
threads=${THREADS:-1} models=${MODELS:-build/models} out=${OUT:-build/peers}
scenarios=${SCENARIOS:-one_client sixteen_clients four_long_prompts shared_prefix}
servers=${SERVERS:-ours ours-compiled tf-cb vllm llama.cpp}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
at="--host 127.0.0.1 --port {port}"

command_of() {
    case $1 in
    ours) echo ours ;;
    ours-compiled) echo "ours-compiled=--torch-compile True" ;;
    tf-cb) echo "tf-cb=$TRANSFORMERS serve --continuous-batching --device cpu --dtype bfloat16 $at {model}" ;;
    vllm) echo "vllm=$VLLM serve {model} $at --dtype bfloat16 --max-model-len 4096 --max-num-seqs 32" ;;
    llama.cpp)
        echo "llama.cpp=$LLAMA_SERVER -m {model}.gguf $at -np 16 -c 32768 --kv-unified -t $threads -tb $threads" ;;
    *) echo "no such server: $1" >&2; exit 2 ;;
    esac
}

for shape in ${*:-llama-135m qwen-0.5b}; do
    # Output lengths: enough tokens to time the fast ones by, few enough to wait for the slow ones.
    case $shape in *0.5b) scale=${SCALE:-0.25} ;; *) scale=${SCALE:-0.5} ;; esac
    set --
    for server in $servers; do
        command=$(command_of "$server")
        set -- "$@" --server "$command"
    done
    # shellcheck disable=SC2086
    .venv/bin/python -m benchmarks.compare "$shape" "$@" --threads "$threads" --models "$models" --settle 600 \
        --length-scale "$scale" --scenarios $scenarios --json "$out/$shape.json" | tee "$out/$shape.md"
done

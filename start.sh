#!/usr/bin/env bash
# Serves a model: makes .venv and installs what is missing, then runs main.py with the arguments given here.
# --torch-index URL (or TORCH_INDEX_URL) names where to get PyTorch from, when the default build does not fit the machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/venv.sh

torch_index="${TORCH_INDEX_URL:-}"
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --torch-index=*) torch_index="${1#*=}" ;;
    --torch-index)
      [ $# -gt 1 ] || { echo "start.sh: --torch-index: needs an address" >&2; exit 2; }
      torch_index="$2"
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

prepare_venv requirements.txt "$torch_index"
# The odd expansion: in bash 3.2 an empty array counts as unset.
exec .venv/bin/python main.py ${arguments[@]+"${arguments[@]}"}

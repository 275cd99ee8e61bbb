# Makes .venv and installs requirements into it, once. Sourced by start.sh and the other scripts; runs on Linux and macOS,
# whose bash is 3.2. The stamp holds the very text that was installed, so no tool for hashes is needed.

find_python() {
  local name
  # Newest last among the named ones: a wheel for the latest Python tends to come late.
  for name in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.11 python3.14 python3 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "Python 3.11 or newer is needed and was not found. Install it, or name it: PYTHON=/path/to/python3 $0" >&2
  return 1
}

# prepare_venv REQUIREMENTS [TORCH_INDEX]: .venv has what the file asks for, torch from the given index if one is given.
prepare_venv() {
  local requirements=$1 torch_index=${2:-} stamp wanted python pin
  stamp=".venv/installed-${requirements//\//-}"
  # All files that the named one reads. The last word keeps 7.2 from being taken for the beginning of 7.2.2.
  wanted="$(cat requirements.txt; [ "$requirements" = requirements.txt ] || cat "$requirements"; echo end)"
  if [ -n "$torch_index" ]; then
    wanted="$wanted
# torch from $torch_index"
  fi
  # Started later without an index, torch stays as it is: the stamp only has to begin with the files' text.
  if [ -x .venv/bin/python ] && [ -f "$stamp" ]; then
    case "$(cat "$stamp")" in "$wanted"*) return ;; esac
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)" || return 1
    echo "making .venv with $("$python" --version)" >&2
    "$python" -m venv --clear .venv || {
      echo "$python cannot make a virtual environment; on Debian and Ubuntu, install its -venv package" >&2
      return 1
    }
  fi
  rm -f "$stamp"
  if [ -n "$torch_index" ]; then
    pin="$(sed -n 's/^torch==\([^ ;#]*\).*/\1/p' requirements.txt)"
    # Forced, because another build of the same version counts as installed; its dependencies come with the rest.
    install --force-reinstall --no-deps --index-url "$torch_index" "torch==$pin" || return 1
  elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! has_torch; then
    echo "no NVIDIA GPU found: the much smaller CPU build of PyTorch will do. To get it, give the address that the" >&2
    echo "selector on pytorch.org's \"Get started\" page shows for CPU: --torch-index URL, or TORCH_INDEX_URL=URL" >&2
  fi
  install -r "$requirements" || return 1
  printf '%s\n' "$wanted" >"$stamp"
}

install() {
  .venv/bin/python -m pip install --disable-pip-version-check "$@"
}

has_torch() {
  .venv/bin/python -c 'from importlib.metadata import version; version("torch")' 2>/dev/null
}

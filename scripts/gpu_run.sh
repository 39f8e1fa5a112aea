#!/usr/bin/env bash
# Runs the GPU bundle that `make gpu-bundle` packs.
#
#   run.sh tests [PYTEST ARGS]      every test; a missing GPU is a failure
#   run.sh sanitize [TOOL...]       compute-sanitizer (memcheck racecheck initcheck synccheck)
#   run.sh bench [ARGS]             side by side with the peers (benches/peers.py)
#   run.sh sweep [ARGS]             every size, batch and layout (benches/sweep.py)
#   run.sh criterion [ARGS]         the core's own benchmarks
#   run.sh exec COMMAND [ARGS]      any command with the wheel installed, as `exec qdp info`
#
# It needs Python 3.11+ with numpy, torch and pytest, and installs nothing there: the wheel goes to
# a temporary folder. PYTHON names the interpreter; wheels in the folder QDP_EXTRA_WHEELS are
# installed too (peers to compare with).
set -euo pipefail
shopt -s nullglob

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 1 ] || usage
command=$1; shift

python=${PYTHON:-python3}
wheels=()
[ -z "${QDP_EXTRA_WHEELS:-}" ] || wheels=("$(cd "$QDP_EXTRA_WHEELS" && pwd)"/*.whl)
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --target "$site" wheels/*.whl ${wheels[@]+"${wheels[@]}"}
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH

status=0
# Runs a command and goes on; run.sh fails at its end if any failed.
try() {
    echo "== $*"
    "$@" || { echo "== failed with $?: $*" >&2; status=1; }
}

# Asked first: without a GPU that the wheel has kernels for, the rest would take its time to say so.
require_gpu() {
    case " $* " in *" cpu "*) return ;; esac
    "$python" -c 'import qdp; qdp.Engine("cuda:0")'
}

run_pytest=("$python" -m pytest -p no:cacheprovider tests/python)

sanitize() {
    local sanitizer tool
    sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) || {
        echo "compute-sanitizer is not installed" >&2
        exit 1
    }
    for tool in "$@"; do
        local check=("$sanitizer" --tool "$tool" --error-exitcode 99 --target-processes all)
        # Torch's caching allocator would hide an access past the end of one of its tensors.
        if [ "$tool" = memcheck ]; then export PYTORCH_NO_CUDA_MEMORY_CACHING=1; fi
        try "${check[@]}" "${run_pytest[@]}" --timeout=0 -m "sanitize and gpu"
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
        for binary in rust-tests/gpu; do
            try "${check[@]}" "$binary" sanitize --test-threads=1
        done
    done
}

case $command in
    tests)
        export QDP_REQUIRE_GPU=1
        require_gpu
        for binary in rust-tests/*; do try "$binary"; done
        try "${run_pytest[@]}" "$@"
        ;;
    sanitize)
        export QDP_REQUIRE_GPU=1
        require_gpu
        [ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
        sanitize "$@"
        ;;
    bench) require_gpu "$@"; try "$python" benches/peers.py "$@" ;;
    sweep) require_gpu "$@"; try "$python" benches/sweep.py "$@" ;;
    criterion) for binary in rust-benches/*; do try "$binary" --bench "$@"; done ;;
    exec) cd "$start"; "$@" || status=$? ;;
    *) usage ;;
esac
exit "$status"

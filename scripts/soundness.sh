#!/usr/bin/env bash
# Looks for undefined behaviour and data races in qdp-core, on any machine with rustup:
#
#   soundness.sh [miri] [tsan] [asan]      all of them where none is named
#
#   miri   the modules that are pure Rust, in an interpreter that knows the language's rules
#   tsan   ThreadSanitizer: the pipeline, the batcher under stress (for QDP_STRESS_SECONDS) and the
#          thread pool, with the standard library rebuilt
#   asan   AddressSanitizer: all of the unit tests
#
# Missing components of the nightly toolchain (NIGHTLY names another) are added. What cannot be run
# here is skipped, and said so; what was run and found something makes the exit status 1.
# PROPTEST_CASES is the number of cases in each property test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NIGHTLY=${NIGHTLY:-nightly}
export QDP_SKIP_KERNELS=1 CARGO_INCREMENTAL=0
host=$(rustc -vV | sed -n 's/^host: //p')
summary=()
status=0

# Whether the toolchain has a component, after an attempt to add it.
has() {
    rustup component list --toolchain "$NIGHTLY" --installed 2>/dev/null | grep -q "^$1" \
        || rustup component add --toolchain "$NIGHTLY" "$1"
}

# Runs a check, builds it first: what does not build was not checked.
check() {
    local name=$1
    shift
    local cargo=(cargo "+$NIGHTLY") test=()
    while [ "$1" != -- ]; do cargo+=("$1"); shift; done
    test=("${@:2}")
    echo "== $name"
    if ! "${cargo[@]}" --no-run; then
        summary+=("$name: FAILED to build")
        status=1
    elif "${cargo[@]}" -- "${test[@]}"; then
        summary+=("$name: nothing found")
    else
        summary+=("$name: FOUND something, see above")
        status=1
    fi
}

skip() { summary+=("$1: skipped, $2"); }

miri() {
    has miri && has rust-src || { skip miri "$NIGHTLY has no miri or rust-src"; return; }
    # Not isolated: tests look at clocks and at files of regressions. Leaks: the pools' threads live
    # as long as the process. Provenance: parking_lot keeps pointers in integers. Rounding: by
    # default Miri adds errors to cos and its kin, beyond what tests of accuracy allow.
    local flags="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-permissive-provenance"
    flags+=" -Zmiri-no-extra-rounding-error"
    # Left out are tests of every value of a type; tests of large arrays leave themselves out.
    MIRIFLAGS="$flags ${MIRIFLAGS:-}" PROPTEST_CASES=${PROPTEST_CASES:-2} \
        check miri miri test -p qdp-core --lib -- \
        pipeline:: coalesce:: cpu::parallel:: encoding:: element:: input:: config:: error:: plan:: \
        --skip every_half
}

tsan() {
    has rust-src || { skip tsan "$NIGHTLY has no rust-src"; return; }
    # The standard library must be instrumented, too, or its locks are not seen.
    RUSTFLAGS="-Zsanitizer=thread ${RUSTFLAGS:-}" PROPTEST_CASES=${PROPTEST_CASES:-16} \
        check tsan test -Zbuild-std --target "$host" -p qdp-core --lib --test batcher_stress -- \
        pipeline:: coalesce:: cpu::parallel:: stress
}

asan() {
    RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}" PROPTEST_CASES=${PROPTEST_CASES:-16} \
        check asan test --target "$host" -p qdp-core --lib --
}

[ $# -gt 0 ] || set -- miri tsan asan
if ! rustup run "$NIGHTLY" rustc --version; then
    rustup toolchain install --profile minimal "$NIGHTLY" || {
        for name in "$@"; do skip "$name" "there is no $NIGHTLY toolchain"; done
        set --
    }
fi
for name in "$@"; do
    case $name in
        miri | tsan | asan) "$name" ;;
        *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    esac
done
printf '== %s\n' "${summary[@]}"
exit "$status"

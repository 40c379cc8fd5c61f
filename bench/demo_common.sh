# Shared by the demos: their command line, stages with their seconds, and one training beside another.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 143' TERM

# begin NAME [full] [out=FOLDER] [KEY=VALUE ...]: empties the folder of an earlier demo; values go to all trainings.
begin() {
    out=outputs/$1 full=false overrides=("runtime.threads=$((($(nproc) + 1) / 2))") # two trainings run at a time
    shift
    for word in "$@"; do
        case $word in
            full) full=true ;;
            out=*) out=${word#out=} ;;
            *=*) overrides+=("$word") ;;
            *) fail "'$word' is neither full nor KEY=VALUE" ;;
        esac
    done
    if [ -e "$out" ] && [ ! -f "$out/.demo" ] && [ -n "$(ls -A "$out")" ]; then
        fail "out=$out holds other things than an earlier demo; name another folder"
    fi
    rm -rf "$out"
    mkdir -p "$out"
    touch "$out/.demo"
}

# stage NAME COMMAND ...: runs a root script.
stage() {
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s: python %s\n' "$name" "$*" >&2
    "$python" "$@" || fail "$name ended with status $?; its output above says why"
    echo "$name $((SECONDS - started))" >> "$out/seconds.txt"
}

# beside NAME COMMAND ...: starts a root script whose end `join` waits for.
beside() {
    beside=$1
    shift
    printf '\n== %s, beside the next: python %s > %s\n' "$beside" "$*" "$out/$beside.log" >&2
    "$python" "$@" > "$out/$beside.log" 2>&1 &
}

join() {
    local started=$SECONDS
    wait $! || fail "$beside ended with status $?; $out/$beside.log says why"
    echo "wait_for_$beside $((SECONDS - started))" >> "$out/seconds.txt"
}

fail() {
    echo "demo: $1" >&2
    exit 1
}

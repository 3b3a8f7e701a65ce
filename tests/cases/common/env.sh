# Sourced by every run.sh: works in a throw-away copy of the case's folder.
#   PY, L: the product's python and lorelei. Prints what was seen and one line PASS or FAIL.
PY=${PY:?run through ./run}
L=${L:?run through ./run}
export HF_HUB_OFFLINE=1 PYTHONPATH=${PYTHONPATH:-}
CASE=$(pwd); COMMON=$CASE/../common
W=$(mktemp -d); trap 'rm -rf "$W"' EXIT
cp -r "$CASE"/. "$W"; for f in run.yaml rows.jsonl rewards.py; do [ -e "$W/$f" ] || cp "$COMMON/$f" "$W"; done
cp "$COMMON/mk_tiny.py" "$COMMON/play.py" "$W"; cd "$W"
quiet() { "$@" >/dev/null 2>&1; }
tiny() { quiet "$PY" mk_tiny.py "${1:-model}"; }                      # ./model, the plain one
lorelei() { timeout ${T:-100} "$L" "$@"; }
lines() { tail -${1:-2} | cut -c1-300; }
verdict() { if [ "$1" = 0 ]; then echo "PASS $2"; else echo "FAIL $2"; fi; }

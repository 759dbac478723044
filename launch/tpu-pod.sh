#!/bin/bash
# One training on a Cloud TPU slice, from a machine that stays on and has `gcloud`:
#
#   export TPU=NAME ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e MOUNT='sudo mount ... /runs'
#   launch/tpu-pod.sh keep train configs/lckv-7b.yaml out=/runs/lckv-7b   # a new slice after each preemption
#   launch/tpu-pod.sh once train configs/lckv-7b.yaml out=/runs/lckv-7b   # once, on the slice NAME that is there
#   launch/tpu-pod.sh once processes                                      # first of all: do the workers find each other?
#
# OUT must be on a file system that all workers see; MOUNT mounts it on a new worker. SPOT= asks for a slice on demand,
# CREATE_FLAGS are further flags of `gcloud compute tpus queued-resources create`. docs/launch.md says more.
set -u

RESTARTS_WITHOUT_PROGRESS=${RESTARTS_WITHOUT_PROGRESS:-3}
POLL=${POLL:-30}                                       # seconds between two looks at the state of the slice
SETUP=${SETUP:-'PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
python3 -m uv pip install --quiet --python .venv/bin/python "jax[tpu]" -r requirements.txt'}

say() { echo "tpu-pod.sh: $*"; }
fail() { say "$*" >&2; exit 2; }

cd "$(dirname "$0")/.." || exit
mode=${1:-}
case $mode in keep|once) shift ;; *) fail "write keep or once, then a command of lckv_jax, such as: once processes" ;; esac
if [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then fail "export TPU=NAME and ZONE=ZONE"; fi
out=
for word in "$@"; do
    case $word in out=*) out=${word#out=} ;; esac
done
if [ "$mode" = keep ]; then
    if [ -z "${TYPE:-}" ] || [ -z "${VERSION:-}" ]; then
        fail "export TYPE and VERSION, such as v6e-16 and v2-alpha-tpuv6e"
    fi
    [ -n "$out" ] || fail "write out=OUT after CONFIG: whether the run makes progress is seen from OUT/checkpoints"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

on_workers() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "$1" </dev/null; }

state() {                                              # empty if there is no such slice
    gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format 'value(state.state)' 2>/dev/null
}

create() {
    # shellcheck disable=SC2086                        # CREATE_FLAGS are several words
    gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --zone "$ZONE" --accelerator-type "$TYPE" \
        --runtime-version "$VERSION" ${SPOT---spot} ${CREATE_FLAGS:-} || fail "the slice was refused, as said above"
}

delete() { gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" --force --quiet; }

get_slice() {                                          # waits, for days if it must, until the slice is there
    local now told=
    while now=$(state); [ "$now" != ACTIVE ]; do
        [ "$now" = "$told" ] || say "slice $TPU: ${now:-not there}"
        told=$now
        case $now in
            '') create ;;
            SUSPENDED) delete ;;
            SUSPENDING|DELETING) sleep "$POLL" ;;
            FAILED) fail "slice $TPU cannot be had; gcloud compute tpus queued-resources describe $TPU says why" ;;
            *) sleep "$POLL" ;;
        esac
    done
}

set_up() {                                             # our code, Python and JAX on all workers
    tar czf "$work/lckv.tar.gz" lckv_jax configs launch requirements.txt || return
    gcloud compute tpus tpu-vm scp "$work/lckv.tar.gz" "$TPU:" --zone "$ZONE" --worker all || return
    on_workers "${MOUNT:-true} && mkdir -p lckv && tar xzf lckv.tar.gz -C lckv && cd lckv && $SETUP"
}

worker_script() {                                      # what each worker runs; what an earlier start left is ended first
    cat <<SCRIPT
cd lckv || exit 2
old=\$(cat run.pid 2>/dev/null) && kill "\$old" 2>/dev/null && for _ in \$(seq 60); do
    kill -0 "\$old" 2>/dev/null || break; sleep 1
done
[ -z "\$old" ] || kill -KILL "\$old" 2>/dev/null
[ -z $(printf %q "$out") ] ||
    echo "tpu-pod.sh: from step \$(ls $(printf %q "$out")/checkpoints 2>/dev/null | grep -E '^[0-9]+\$' | sort -n | tail -n 1)"
.venv/bin/python -u -m lckv_jax$(printf ' %q' "$@") &
echo \$! > run.pid
wait \$!
code=\$?
rm run.pid
echo "tpu-pod.sh: exit code \$code"
exit \$code
SCRIPT
}

# Runs the command on all workers; the run's exit code: 1, 2 or 130 if any worker has it, 255 if the connection was lost.
# It is a job of its own (set -m), so that Ctrl-C reaches the workers through `stop`, and not gcloud before them.
start() {
    local code seen
    set -m
    on_workers "$(worker_script "$@")" > >(tee "$work/log") 2>&1 &
    job=$!
    set +m
    while :; do
        wait "$job"
        code=$?
        kill -0 "$job" 2>/dev/null || break            # else a signal woke us
    done
    job=
    sleep 0.2                                          # tee is a moment behind
    seen=$(sed -n 's/.*tpu-pod\.sh: exit code //p' "$work/log" | sort -n | uniq)
    for final in 1 2 130; do
        grep -qx "$final" <<< "$seen" && return "$final"
    done
    [ "$seen" = 0 ] && [ "$code" -eq 0 ] && return 0
    seen=$(grep -vx 0 <<< "$seen" | tail -n 1)
    return "${seen:-255}"
}

job='' stopping=''
stop() {
    [ -n "$job" ] || exit 130                          # nothing runs yet
    stopping=yes
    say "stopping; the workers save first"
    # shellcheck disable=SC2016                        # it is the workers' file
    on_workers 'kill "$(cat lckv/run.pid)"'
}
trap stop INT TERM

settle() {                                             # a slice that was taken away may count as ACTIVE for a while
    for _ in $(seq 10); do
        [ "$(state)" = ACTIVE ] || return
        on_workers true > /dev/null 2>&1 && return
        sleep "$POLL"
    done
}

if [ "$mode" = once ]; then
    set_up || fail "the workers could not be set up, as said above"
    start "$@"
    exit
fi

idle=0 before=none
while :; do
    if [ "$(state)" != ACTIVE ] || [ "$before" = none ]; then
        get_slice
        say "slice $TPU: ACTIVE"
        if ! set_up; then
            settle
            [ "$(state)" != ACTIVE ] || fail "the workers could not be set up, as said above; slice $TPU costs"
            continue
        fi
    fi
    start "$@"
    code=$?
    from=$(sed -n 's/.*tpu-pod\.sh: from step *//p' "$work/log" | head -n 1)
    case $code in
        0) say "done; deleting slice $TPU"; delete; exit 0 ;;
        1|2|130) say "not retried: exit code $code; slice $TPU is still there, and costs"; exit "$code" ;;
    esac
    [ -z "$stopping" ] || { say "stopped with $code; slice $TPU is still there, and costs"; exit "$code"; }
    settle
    if [ "$(state)" = ACTIVE ]; then                   # not a preemption
        [ "$from" = "$before" ] && idle=$((idle + 1)) || idle=0
        if [ "$idle" -ge "$RESTARTS_WITHOUT_PROGRESS" ]; then
            say "given up at step ${from:-0}: $((idle + 1)) starts in a row began there; slice $TPU is still there, and costs"
            exit "$code"
        fi
    fi
    before=$from
    say "starting again after exit code $code"
done

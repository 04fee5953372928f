# For the batch scripts beside it: runs the job's step, has it save before the time limit, and requeues the job.
#
#   run_step RUN COMMAND...      RUN is the run directory (log.directory)
#
# Exit codes of megatron_llama.train: 0 done; 75 stopped with its state saved; 78 a mistake that no restart mends (2: wrong
# usage). After any other end (69: a rank has died or does not answer) the job is requeued as well, as long as restarts bring
# new checkpoints: at most MAX_FRUITLESS_RESTARTS (3) in a row without one. SLURM itself requeues jobs that lose a node
# (--requeue).

stop_signal=${STOP_SIGNAL:-USR1}  # torchrun's agents know TERM only

newest_checkpoint() {
    (find "$1/checkpoints" -path '*/step_*/COMMIT' 2>/dev/null || true) | sort | tail -n 1
}

run_step() {
    local run=$1 before code fruitless=0 counter
    shift
    before=$(newest_checkpoint "$run")
    mkdir -p "$run"
    # (srun may end with the code of a rank that it killed after the one that matters)
    export NO_RESTART_FILE="$run/no-restart-$SLURM_JOB_ID"
    rm -f "$NO_RESTART_FILE"
    counter="$run/fruitless-restarts-$SLURM_JOB_ID"

    # In the background, as bash runs a trap only between commands, and `wait` can be interrupted.
    "$@" &
    local step=$!
    trap 'echo "time is almost up: asking the ranks to save and stop"; scancel --signal="$stop_signal" "$SLURM_JOB_ID"' USR1
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true
    done
    trap '' USR1
    code=0
    wait "$step" || code=$?

    if [[ -e $NO_RESTART_FILE ]]; then
        rm -f "$NO_RESTART_FILE"
        code=78
    fi
    echo "the step ended with code $code"
    case $code in
        0) rm -f "$counter"; return 0 ;;
        2 | 78) echo "a restart would not help"; exit "$code" ;;
    esac
    if [[ $(newest_checkpoint "$run") == "$before" ]]; then
        fruitless=$(( $(cat "$counter" 2>/dev/null || echo 0) + 1 ))
    fi
    if (( fruitless > ${MAX_FRUITLESS_RESTARTS:-3} )); then
        echo "$fruitless times in a row without a new checkpoint: not requeued"
        exit "$code"
    fi
    echo "$fruitless" > "$counter"
    echo "requeued"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # until SLURM ends this instance
}

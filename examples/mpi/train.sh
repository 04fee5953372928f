#!/usr/bin/env bash
# Trains on the nodes of a hostfile, without a scheduler: mpirun (Open MPI 5) starts one process per slot.
#
#   examples/mpi/train.sh HOSTFILE CONFIG.toml [--section.field value ...]
#
# Run it from the project's root, which all nodes see at the same path, and can reach each other by ssh without a password. Run
# again with the same arguments, it goes on from the newest checkpoint. RUN=DIRECTORY sets the run directory, PYTHON=FILE the
# interpreter, MPIRUN="mpirun OPTIONS" another mpirun or further options of it.
#
#   kill -USR1 PID    (the script's) saves and stops; TERM would leave the ranks a quarter of a second
#
# Ranks fill node after node, so that tensor-parallel groups stay inside a node. Open MPI binds a process to one core or a few
# unless told otherwise, which would put all threads of a rank there.

set -euo pipefail
if (( $# < 2 )); then
    echo "usage: examples/mpi/train.sh HOSTFILE CONFIG.toml [--section.field value ...]" >&2
    exit 2
fi
hostfile=$1 config=$2
shift 2
source examples/mpi/environment.sh

exec $mpirun --hostfile "$hostfile" --bind-to none "${exported[@]}" \
    "$python" -m megatron_llama.train --config "$config" --log.directory "$run" "$@"

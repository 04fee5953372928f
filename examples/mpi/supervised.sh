#!/usr/bin/env bash
# Trains on the nodes of a hostfile: mpirun (Open MPI 5) starts one supervisor per node, and the supervisor one process per GPU.
#
#   GPUS_PER_NODE=8 examples/mpi/supervised.sh HOSTFILE CONFIG.toml [--section.field value ...]
#
# When a rank dies or hangs, the supervisors write a report and start all ranks again within seconds. SUPERVISE="--nodes 4 ..."
# gives them further options (docs/failures.md). As train.sh otherwise.

set -euo pipefail
if (( $# < 2 )); then
    echo "usage: examples/mpi/supervised.sh HOSTFILE CONFIG.toml [--section.field value ...]" >&2
    exit 2
fi
hostfile=$1 config=$2
shift 2
source examples/mpi/environment.sh
read -ra options <<< "${SUPERVISE:-}"

exec $mpirun --hostfile "$hostfile" --map-by ppr:1:node --bind-to none "${exported[@]}" \
    "$python" -m megatron_llama.supervise --ranks "${GPUS_PER_NODE:-8}" "${options[@]}" \
    -- train --config "$config" --log.directory "$run" "$@"

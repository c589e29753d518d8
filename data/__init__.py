"""Data for every stage, and the two small helpers that every command line shares.

`Parser` and `run_cli` give all programs the same manners: bad input is one line that says what to do (exit code 2, no
traceback), Ctrl-C is exit code 130. They live here because this package imports nothing heavy.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and name the valid flags when a flag is unknown."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            flags = sorted(s for a in self._actions for s in a.option_strings if s.startswith("--"))
            message += f" (valid flags: {' '.join(flags)})"
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run a program's main(); turn bad input into one line and exit code 2, Ctrl-C into exit code 130.

    ValueError and OSError are how this project reports bad input (a wrong flag, file, shape, a full disk). Set
    OCTO_TRACEBACK=1 to see where one was raised.
    """
    try:
        main()
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("OCTO_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        sys.exit(2)

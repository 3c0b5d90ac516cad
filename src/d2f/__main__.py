"""Entry point of the command line: the script `d2f` and `python -m d2f` both call `main`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C while its modules load ends the process with one line."""
    try:
        from d2f.cli.main import main as run
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stderr.write("stopped\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()

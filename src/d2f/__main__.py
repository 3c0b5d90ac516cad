"""The command line's way in: `d2f`, and `python -m d2f` where that script is not on the path."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line, whose modules take a moment to load."""
    try:
        from d2f.cli.main import main as run
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stderr.write("stopped\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()

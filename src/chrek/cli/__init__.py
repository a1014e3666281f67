"""The command line ``chrek``: for people who look after checkpoints, and for machines without Kubernetes.

One module a verb. `main` is what the installed program calls; it stays light, because shells ask for
completions with every press of a key and scripts call ``chrek list`` in loops: the version needs no import at
all, and each verb imports what it uses when it runs.

``program``    the group of verbs, each imported only when it is called
``options``    options that several verbs share
``ending``     the one place where an error becomes a message and an exit code
``output``     tables, sizes, times, JSON
``progress``   a bar with rate and time left on a terminal, plain lines elsewhere
``targets``    which running application is meant
``isolation``  the small container that `run` and `restore` make on a plain machine
``foreground`` the program outside it: streams, signals, the application's exit status
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program; never returns."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from chrek import __version__

        sys.stdout.write(f"chrek {__version__}\n")
        sys.exit(0)
    from chrek.cli.ending import run_program

    sys.exit(run_program())

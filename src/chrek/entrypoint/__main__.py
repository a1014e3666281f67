"""``restore-entrypoint -- COMMAND…``: the first process of a container.

Run by path or by ``-m``, with ``python3 -I -S``: nothing of the application's (PYTHONPATH, a sitecustomize in
its site-packages, modules in its working directory) may reach this process. The package is then on no
search path, so it is found from this file's own place.
"""

import _signal  # type: ignore[import-not-found] # what `signal` wraps, without its enums: 3 ms

# Before anything else: a SIGTERM that comes while the interpreter still imports is kept.
BLOCKED = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())

import os  # noqa: E402
import sys  # noqa: E402

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from chrek.entrypoint.init import main  # noqa: E402

os._exit(main(sys.argv[1:], {int(number) for number in BLOCKED}))

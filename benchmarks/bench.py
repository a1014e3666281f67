"""What `make bench` runs: the comparison with stock CRIU, then its picture. Arguments are those of ``core.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Measure, then draw every result that has no picture or an older one."""
    measured = subprocess.run([sys.executable, str(HERE / "core.py"), *sys.argv[1:]], check=False)
    if measured.returncode:
        return measured.returncode
    stale = [
        path
        for path in sorted((HERE / "results").glob("core-*.json"))
        if not path.with_suffix(".png").exists() or path.with_suffix(".png").stat().st_mtime < path.stat().st_mtime
    ]
    return subprocess.run([sys.executable, str(HERE / "plot.py"), *map(str, stale)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

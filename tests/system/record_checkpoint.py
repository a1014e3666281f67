"""Record a small checkpoint as the present code writes it: ``python -m system.record_checkpoint ARCHIVE``, as root.

Later versions have to read what earlier ones wrote, so one checkpoint of each format (and of each kind of digest)
stays in ``tests/unit/inputs``, and `tests/unit/test_recorded_checkpoints.py` reads them all. An archive that is there
is never made again: it is the witness of what was written then. CRIU's log names the paths of the machine: run this
in a copy of the checkout at a place that may be told.

The application has one of everything that has a place of its own in a checkpoint: two processes, memory of
several blocks, a changed root, a volume, and deleted files that are still open.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

from chrek.engine import capture as capturing
from chrek.store.layout import Store
from containers import Container, Mount, remove_leftovers

CHECKPOINT_ID = "recorded"

APPLICATION = """
echo changed > /etc/recorded
echo in a volume > /cache/file
exec 3> /cache/deleted 4< /cache/file 5> /var/tmp/linked
echo open and deleted >&3
ln /var/tmp/linked /var/tmp/other
rm /cache/deleted /var/tmp/linked
mkfifo /tmp/never
(text=child-; for step in 1 2 3 4 5 6 7 8 9 10 11 12 13; do text=$text$text; done
 echo ready >&2; read nothing < /tmp/never) &
text=0123456789abcdef
for step in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18; do text=$text$text; done
echo ready
read nothing < /tmp/never
"""


def main() -> None:
    """Capture the application and pack the store; a link, a generation and nothing else."""
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is there; what was recorded is not recorded again.")
    remove_leftovers()
    command = ["/usr/local/bin/restore-entrypoint", "--", "sh", "-c", APPLICATION]
    with (
        tempfile.TemporaryDirectory() as place,
        Container(command, hostname="recorder", mounts=[Mount.tmpfs("/cache")]) as source,
        Store.open(Path(place) / "store", create=True) as store,
    ):
        source.until(lambda: "ready" in source.log and "ready" in source.err, what="both processes to be ready")
        capturing.capture(
            capturing.Request(
                pid1=source.pid1, store=store, checkpoint_id=CHECKPOINT_ID, location=f"/checkpoints/{CHECKPOINT_ID}"
            )
        )
        with tarfile.open(target, "w:xz") as archive:
            for name in (CHECKPOINT_ID, f".generations/{CHECKPOINT_ID}"):
                archive.add(Path(place) / "store" / name, name)


if __name__ == "__main__":
    main()

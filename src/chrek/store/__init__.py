"""Where checkpoints are kept: a directory, safe to share between nodes and to kill anywhere.

Writers take a lock for each id; readers take none, and a store may be read-only for them.
"""

from chrek.store.flush import start_writeback
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from chrek.store.space import free_bytes, require_space, write_failed
from chrek.store.staging import Published, Staging, write_file

__all__ = [
    "Published",
    "Staging",
    "Store",
    "free_bytes",
    "open_checkpoint",
    "require_space",
    "start_writeback",
    "write_failed",
    "write_file",
]

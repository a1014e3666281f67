"""Where checkpoints are kept: a directory, safe to share between nodes and to kill anywhere.

Writers take a lock for each id; readers take none, and a store may be read-only for them.
"""

from chrek.store.delete import delete
from chrek.store.flush import start_writeback
from chrek.store.gc import Action, Kept, Outcome, Plan, Policy, What, collect, plan
from chrek.store.layout import Store
from chrek.store.listing import Listed, Summary, list_checkpoints
from chrek.store.opening import identity, open_checkpoint
from chrek.store.pins import pin, pinned_ids, unpin
from chrek.store.publication import write_file
from chrek.store.space import free_bytes, require_space, write_failed
from chrek.store.staging import Published, Staging

__all__ = [
    "Action",
    "Kept",
    "Listed",
    "Outcome",
    "Plan",
    "Policy",
    "Published",
    "Staging",
    "Store",
    "Summary",
    "What",
    "collect",
    "delete",
    "free_bytes",
    "identity",
    "list_checkpoints",
    "open_checkpoint",
    "pin",
    "pinned_ids",
    "plan",
    "require_space",
    "start_writeback",
    "unpin",
    "write_failed",
    "write_file",
]

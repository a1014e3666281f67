"""Moving a process tree's memory between the processes and a checkpoint, with many threads.

CRIU knows which pages there are and makes the mappings; this package moves the bytes. At a capture the caller
gives the ranges of frozen processes: `shared_pages` says which of them must stay in CRIU's images, `capture`
copies the others into shards (or `adopt_pages_images` points into pages that CRIU wrote), `digest` makes up
for digests that were left for after the thaw, `write_index` seals. At a restore `read_index` checks,
`prefetch` warms, `fill` writes. The files are described in ``docs/format-memory.md``.
"""

from chrek.memory.adopt import adopt_pages_images
from chrek.memory.capture import Captured, capture
from chrek.memory.crew import Limits, default_workers
from chrek.memory.digest import digest, verify
from chrek.memory.fill import Filled, Verify, fill
from chrek.memory.index import INDEX_NAME, Index, PageFile, decode
from chrek.memory.prefetch import Prefetch, prefetch
from chrek.memory.ranges import PAGE, PageRun, Range, in_order
from chrek.memory.shard import Folders, read_index, write_index
from chrek.memory.sharing import shared_pages

__all__ = [
    "INDEX_NAME",
    "PAGE",
    "Captured",
    "Filled",
    "Folders",
    "Index",
    "Limits",
    "PageFile",
    "PageRun",
    "Prefetch",
    "Range",
    "Verify",
    "adopt_pages_images",
    "capture",
    "decode",
    "default_workers",
    "digest",
    "fill",
    "in_order",
    "prefetch",
    "read_index",
    "shared_pages",
    "verify",
    "write_index",
]

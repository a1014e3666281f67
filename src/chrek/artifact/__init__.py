"""What a checkpoint is: its format, digests, and how one is opened and verified.

The format is described for other readers in ``docs/format.md``. Where checkpoints are kept, and how
they get there, is `chrek.store`.
"""

from chrek.artifact.checkpoint import Checkpoint, open_checkpoint_directory
from chrek.artifact.digest import BLOCK_SIZE, FASTEST, Algorithm, Blocks, BlocksBuilder, FileEntry
from chrek.artifact.manifest import (
    Application,
    Environment,
    Facts,
    Gpu,
    Manifest,
    Memory,
    OpenFile,
    Process,
    Provenance,
    SideFile,
    Stream,
    Volume,
)
from chrek.artifact.marker import Marker, read_marker
from chrek.artifact.names import checkpoint_id, is_checkpoint_id, timestamp, unix_time
from chrek.artifact.verify import Level, Problem, Progress, Report, is_pool_blob
from chrek.artifact.written import FORMAT_VERSION, WRITTEN

__all__ = [
    "BLOCK_SIZE",
    "FASTEST",
    "FORMAT_VERSION",
    "WRITTEN",
    "Algorithm",
    "Application",
    "Blocks",
    "BlocksBuilder",
    "Checkpoint",
    "Environment",
    "Facts",
    "FileEntry",
    "Gpu",
    "Level",
    "Manifest",
    "Marker",
    "Memory",
    "OpenFile",
    "Problem",
    "Process",
    "Progress",
    "Provenance",
    "Report",
    "SideFile",
    "Stream",
    "Volume",
    "checkpoint_id",
    "is_checkpoint_id",
    "is_pool_blob",
    "open_checkpoint_directory",
    "read_marker",
    "timestamp",
    "unix_time",
]

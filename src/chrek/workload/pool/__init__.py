"""GPU memory that leaves before a checkpoint and comes back to the same addresses after the restore.

`TensorPool` is for applications; `save` and `load` are for frameworks that map memory themselves (vLLM's
sleep mode). Standard library and the application's own PyTorch only.
"""

from chrek.workload.pool.errors import CudaError, PoolCorrupt, PoolError
from chrek.workload.pool.layout import Index, Region
from chrek.workload.pool.places import handover_directory
from chrek.workload.pool.tensors import TensorPool
from chrek.workload.pool.transfer import Options, Report, load, save

__all__ = [
    "CudaError",
    "Index",
    "Options",
    "PoolCorrupt",
    "PoolError",
    "Region",
    "Report",
    "TensorPool",
    "handover_directory",
    "load",
    "save",
]

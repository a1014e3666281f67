"""The application's side of a checkpoint: one call, no dependencies, Python 3.9 or newer.

::

    from chrek.workload import Outcome, checkpoint_point

    model = load_model()
    if checkpoint_point() is Outcome.CHECKPOINTED:
        sys.exit(0)
    serve(model)

Works unchanged where ChReK is absent. Importable alone: nothing of the rest of ChReK is used.
"""

from chrek.workload.lifecycle import CheckpointFailed, Outcome, checkpoint_point, read_marker, write_ready

__all__ = ["CheckpointFailed", "Outcome", "checkpoint_point", "read_marker", "write_ready"]

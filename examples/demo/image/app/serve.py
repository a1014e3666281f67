"""The demo's server where a Job checkpoints it: loaded and warm first, then the offer, then the server.

`checkpoint_point` is all that an application adds. The Job's process ends there once its checkpoint is taken; a restored
one goes on there, and serves; without ChReK nothing happens.
"""

from __future__ import annotations

import sys

import uvicorn
from server import PORT, app

from chrek.workload import Outcome, checkpoint_point

if __name__ == "__main__":
    if checkpoint_point() is Outcome.CHECKPOINTED:
        sys.exit(0)
    uvicorn.run(app, host="0.0.0.0", port=PORT, log_level="info")

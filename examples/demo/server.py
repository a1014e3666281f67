"""An inference server as people write them: FastAPI and uvicorn in front of a model that onnxruntime runs.

The model (RapidOCR: text detection, direction, recognition) comes with the package ``rapidocr-onnxruntime``. Nothing in
this file knows of checkpoints; what has to be in a server for ChReK is: nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

BEGAN = time.monotonic()

import numpy as np  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from rapidocr_onnxruntime import RapidOCR  # noqa: E402

PORT = 8000
# The picture that warms the model up: the first run of each input shape is several times slower than the next.
BLANK = np.full((480, 640, 3), 255, np.uint8)

app = FastAPI()
reader = RapidOCR()
reader(BLANK)
served = 0


@app.get("/health")
def health() -> dict[str, Any]:
    """Say who is there; a readiness probe asks this."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "threads": threading.active_count(), "served": served}


@app.post("/read")
async def read(request: Request) -> dict[str, Any]:
    """Return the lines of text in a picture, each with its place and how sure the model is."""
    global served  # noqa: PLW0603
    found, _ = reader(await request.body())
    served += 1
    return {"lines": [{"box": box, "text": text, "score": score} for box, text, score in found or []]}


if __name__ == "__main__":
    print(f"model loaded in {time.monotonic() - BEGAN:.1f} s", flush=True)
    uvicorn.run(app, host="0.0.0.0", port=PORT, log_level="info")

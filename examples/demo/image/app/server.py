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

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from rapidocr_onnxruntime import RapidOCR  # noqa: E402

PORT = 8000
# Sizes of pictures to expect (height, width): the first run on each is several times slower than the next.
SHAPES = ((240, 640), (360, 640), (480, 640), (640, 640), (640, 480))


def warm_up(reader: RapidOCR) -> None:
    """Run the models once on each size, with something on the picture to read."""
    for height, width in SHAPES:
        picture = np.full((height, width, 3), 255, np.uint8)
        for row in range(60, height, 60):
            cv2.putText(picture, f"line at {row}", (30, row), cv2.FONT_HERSHEY_SIMPLEX, 1, (20, 20, 20), 2)
        reader(picture)


app = FastAPI()
reader = RapidOCR(det_limit_side_len=480)
warm_up(reader)
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

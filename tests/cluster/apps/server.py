"""The guide's sample, with a model that takes memory and a server that answers from it."""

import hashlib
import http.server
import json
import os
import random
import socket
import sys
import time


def load_model():
    token = random.SystemRandom().randbytes(8).hex()
    numbers, size = random.Random(token), int(os.environ.get("MODEL_MB", "24"))
    return {"token": token, "weights": b"".join(numbers.randbytes(1 << 20) for _ in range(size))}


def main():
    signal_file = os.environ.get("DYN_CHECKPOINT_SIGNAL_FILE")
    ready_file = os.environ.get("DYN_CHECKPOINT_READY_FILE")
    restore_marker = os.environ.get("DYN_RESTORE_MARKER_FILE", "/tmp/dynamo-restored")
    model = load_model()
    print(f"model loaded: {model['token']}", flush=True)
    if signal_file is not None:
        if ready_file:
            with open(ready_file, "w") as f:
                f.write("ready")
        while True:
            if os.path.exists(restore_marker):
                print("restored", flush=True)
                break
            if os.path.exists(signal_file):
                print("checkpoint finished", flush=True)
                return
            time.sleep(0.1)
    run_application(model)


class Handler(http.server.BaseHTTPRequestHandler):
    model: dict = {}

    def do_GET(self):
        if self.path.startswith("/exit"):
            os._exit(int(self.path[len("/exit/") :] or 3))
        answer = {
            "token": self.model["token"],
            "digest": hashlib.sha256(self.model["weights"]).hexdigest(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def run_application(model):
    Handler.model = model
    print("serving", flush=True)
    http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()


if __name__ == "__main__":
    sys.exit(main())

"""A real vLLM through the launcher and the driver's part, without CRIU: ``vllm_in_place.py MODEL DIRECTORY``.

Starts ``vllm serve`` as it is and keeps its answers; starts it again in a checkpoint job; when it is ready (asleep,
weights in files) takes its whole tree through preflight, lock, checkpoint, restore, unlock; writes the restore
marker; compares answers, log-probabilities included. Prints one JSON object a line. Needs src and tests in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chrek.cuda import abi, evidence
from chrek.cuda.detect import detect, refuse
from chrek.cuda.driver import Driver
from chrek.cuda.sequence import GpuState
from gpu.harness import tree

PORT = 8123
CHANCE = random.Random(5)
PROMPTS = [[CHANCE.randrange(3, 900) for _ in range(12)] for _ in range(3)]


def say(**values: object) -> None:
    """One line of results."""
    print(json.dumps(values), flush=True)


def request(method: str, path: str, value: object = None) -> tuple[int, bytes]:
    """One request to the server."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    body = None if value is None else json.dumps(value)
    connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


def answers(count: int = 32) -> list[Any]:
    """Tokens and log-probabilities of every prompt."""
    found = []
    for prompt in PROMPTS:
        value = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "logprobs": 3,
            "ignore_eos": True,
        }
        status, data = request("POST", "/v1/completions", value)
        if status != http.client.OK:
            raise SystemExit(f"completions gave {status}: {data[:300]!r}")
        logprobs = json.loads(data)["choices"][0]["logprobs"]
        found.append([logprobs["tokens"], logprobs["top_logprobs"]])
    return found


def start(model: str, log: Path, options: list[str], **variables: str) -> subprocess.Popen[bytes]:
    """The launcher, as the root of a session of its own."""
    command = [sys.executable, "-m", "chrek.integrations.vllm", "serve", model, "--port", str(PORT)]
    command += ["--host", "127.0.0.1", "--served-model-name", "m", "--max-model-len", "2048", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **variables}
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def wait(process: subprocess.Popen[bytes], log: Path, ready: Path | None) -> float:
    """Seconds until the server answers, or the ready file is there."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < 300:
        if process.poll() is not None:
            raise SystemExit(f"ended with {process.returncode}\n{log.read_text()[-3000:]}")
        try:
            if ready.exists() if ready else request("GET", "/health")[0] == http.client.OK:
                return time.perf_counter() - begin
        except OSError:
            pass
        time.sleep(0.01)
    raise SystemExit(f"not ready\n{log.read_text()[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and everything it started."""
    pids = tree(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        for pid in reversed(pids):
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)


def main() -> None:
    """Run both servers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--evidence", type=Path)
    arguments, options = parser.parse_known_args()
    base: Path = arguments.directory
    base.mkdir(parents=True, exist_ok=True)
    log, ready, marker = base / "log", base / "ready", base / "marker"
    plain = start(arguments.model, log, options)
    cold = wait(plain, log, None)
    answers()
    reference = answers()
    say(step="plain vllm", cold_s=round(cold, 2), repeats_itself=answers() == reference)
    end(plain)
    contract = {
        "DYN_CHECKPOINT_SIGNAL_FILE": str(base / "signal"),
        "DYN_CHECKPOINT_READY_FILE": str(ready),
        "DYN_RESTORE_MARKER_FILE": str(marker),
        "CHREK_POOL_DIRECTORY": str(base / "gpu"),
    }
    process = start(arguments.model, log, options, **contract)
    say(step="checkpoint job", ready_s=round(wait(process, log, ready), 2))
    pids = tree(process.pid)
    if arguments.evidence:
        arguments.evidence.write_text("".join(evidence.read(pid).text() for pid in pids))
    begin = time.perf_counter()
    state = GpuState(Driver())
    states = {process.pid: abi.state_name(process.state) for process in state.find(pids)}
    users = [pid for pid in pids if evidence.uses_driver(pid)]
    refuse(detect([evidence.read(pid, driver_state=states.get(pid, "none")) for pid in users]))
    preflight = time.perf_counter() - begin
    held = state.capture(states)
    left = evidence.remaining_devices(users)
    resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)
    say(
        step="checkpoint",
        processes=len(pids),
        gpu_processes=len(states),
        preflight_s=round(preflight, 3),
        resident_gb=round(resident / 1e9, 2),
        devices_left=sorted({device for devices in left.values() for device in devices}),
        seconds={name: round(value, 3) for name, value in held.seconds.items()},
    )
    begin = time.perf_counter()
    seconds = state.resume(held)
    ready.unlink()
    marker.write_text('{"success": true}')
    wait(process, log, ready)
    awake = time.perf_counter() - begin
    first = answers()
    say(
        step="restored",
        driver={name: round(value, 3) for name, value in seconds.items()},
        awake_s=round(awake, 2),
        exact=first == reference,
    )
    end(process)
    lines = [line for line in log.read_text().splitlines() if "chrek" in line or "weights " in line]
    print("\n".join(lines[-12:]), flush=True)


if __name__ == "__main__":
    main()

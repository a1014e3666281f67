"""Runs one feature inside a container: ``run.py NAME`` sets it up, says ready, and checks it when told.

It is told by a file: the restore marker in a restored process, ``/tmp/go`` in the one that was captured
and runs on. It says ``ok MODE`` or prints what is wrong. Nothing here is imported by a test.
"""

import importlib.util
import os
import sys
import time
import traceback


def main(name):
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "feature_" + name + ".py")
    spec = importlib.util.spec_from_file_location("feature", path)
    feature = importlib.util.module_from_spec(spec)
    sys.modules["feature"] = feature
    spec.loader.exec_module(feature)
    state = feature.setup()
    print("ready", flush=True)
    while True:
        for mode, told in (("restored", "/tmp/dynamo-restored"), ("source", "/tmp/go")):
            if os.path.exists(told):
                try:
                    feature.check(state)
                    print("ok", mode, flush=True)
                except BaseException:
                    traceback.print_exc()
                    print("FAILED", mode, flush=True)
                time.sleep(1000)
        time.sleep(0.01)


main(sys.argv[1])

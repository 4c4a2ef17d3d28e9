"""A program of the out-of-process protocol that behaves, or misbehaves as its argument says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np
from safetensors.numpy import load_file, save_file

CLAIMS = {"stages": ["reduce"], "dialects": ["paper", "glm-5"], "dtypes": ["float32"]}


def answer(request: dict, how: str) -> dict | None:
    given = load_file(request["input"])
    x, g = given["input/x"], given.get("cotangent/out")
    share = np.float32(1 / request["config"]["streams"] if request["config"]["how"] == "mean" else 1)
    found = {"output/out": x.sum(-2) * share}
    if g is not None:
        found["gradient/x"] = np.repeat((g * share)[..., None, :], request["config"]["streams"], axis=-2)
    header = {"format": "mhc-conformance-result/1", "id": request["id"]}
    if how == "wrong-header":
        header["format"] = "something/else"
    if how == "other-header-id":
        header["id"] = "7"
    if how == "surplus":
        found["output/x/y"] = found["gradient/unknown"] = x
    if how == "refuses":
        return {"id": request["id"], "status": "refused", "reason": "not today"}
    if how == "memory":
        return {"id": request["id"], "status": "error", "reason": os.environ.get("MALLOC_PERTURB_", "")}
    if how == "reports":
        return {"id": request["id"], "status": "error", "reason": "no such kernel"}
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crashes":
        raise SystemExit("a bad\nend")
    if how == "hangs":
        time.sleep(3600)
    if how == "silent":
        os.close(1)
        time.sleep(3600)
    if how == "garbage":
        print("hello?", flush=True)
        return None
    if how == "list":
        print("[1, 2]", flush=True)
        return None
    if how == "floods":
        while True:
            sys.stdout.write("x" * 65536)
    if how == "fills-the-disk":
        with open(request["output"], "wb") as file:
            while True:
                file.write(bytes(1 << 24))
    if how == "talks-on":
        print(json.dumps({"id": request["id"], "status": "done"}) + "\n" + json.dumps({"id": "8"}), flush=True)
        return None
    if how == "truncated":
        with open(request["output"], "wb") as file:
            file.write(b"\x10\x00\x00")
    elif how != "no-file":
        save_file({k: np.ascontiguousarray(v.astype(np.float32)) for k, v in found.items()}, request["output"], header)
    return {"id": "other" if how == "other-id" else request["id"], "status": "done"}


def main() -> None:
    how = sys.argv[1] if len(sys.argv) > 1 else ""

    for line in sys.stdin:
        request = json.loads(line)
        if "protocol" in request:
            protocol = "other/1" if how == "other-protocol" else request["protocol"]
            claims = {**CLAIMS, "color": "red"} if how == "unknown-claim" else CLAIMS
            print(json.dumps({"protocol": protocol, "name": "program", "capabilities": claims}), flush=True)
            continue
        flag = os.environ.get("MHC_TEST_FLAG", "")
        once = how.startswith("once-") and not os.path.exists(flag)
        if once:
            open(flag, "w").close()
        found = answer(request, how.removeprefix("once-") if once else "" if how.startswith("once-") else how)

        if found is not None:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

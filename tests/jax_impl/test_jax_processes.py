"""Two processes of `jax.distributed` (gloo): files that both share, and the end of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jax_impl import HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, load_model

START = """
import sys
import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=10)
from pathlib import Path
from flax import nnx
from jax_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig
from jax_impl import load_model, save_model, sharding

config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=16)
mesh = sharding.make_mesh(tensor=2)
layer = sharding.create(lambda: ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0)), mesh)
folder, rank = Path(sys.argv[3]), jax.process_index()
"""

RUN = """
x = sharding.shard(np.ones((2, 4, 4, 16), np.float32), mesh)
run = nnx.jit(lambda layer, x: layer(lambda u: u, lambda inputs: inputs, x, HyperConnectionType.MLP_DENSE)[0])
with sharding.use(mesh):
    while True:
        run(layer, x).block_until_ready()
        print("ran", flush=True)
"""

FILES = """
def said(call):
    try:
        call()
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

layer.save_weights(folder / "site.safetensors")
layer.load_weights(folder / "site.safetensors")  # written before any process goes on
print("absent here:", said(lambda: layer.load_weights(folder / ("site.safetensors" if rank else "absent"))))
print("no folder:", said(lambda: layer.save_weights(folder / "absent" / "site.safetensors")))
layer.save_weights(folder / "again.safetensors")
head = sharding.create(lambda: HyperHead(config, rngs=nnx.Rngs(1)), mesh)
print("in the way:", said(lambda: head.save_weights(folder / "again.safetensors", "head.")))
save_model(folder / "model.safetensors", {"layers.0.": layer, "head.": head})
load_model(folder / "model.safetensors", {"layers.0.": layer, "head.": head})
print("done", flush=True)
"""


def start(tmp_path: Path, rest: str) -> list[subprocess.Popen[bytes]]:
    script = tmp_path / "process.py"
    script.write_text(START + rest)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    return [
        subprocess.Popen(
            [sys.executable, str(script), address, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_that_is_killed_ends_the_other_with_a_message(tmp_path):
    """By JAX's own heartbeat, which one has to set: its default is 100 s."""
    processes = start(tmp_path, RUN)
    try:
        output = processes[0].stdout
        assert output is not None
        timer = threading.Timer(120, processes[0].kill)
        timer.start()
        assert b"ran\n" in iter(output.readline, b""), "it never ran"
        timer.cancel()
        processes[1].kill()
        started = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
        assert time.monotonic() - started < 60
        assert processes[0].returncode != 0 and b"another task died" in errors, errors[-2000:]
    finally:
        end(processes)


def test_what_fails_on_one_process_fails_on_both_and_both_go_on(tmp_path):
    processes = start(tmp_path, FILES)
    try:
        said = [process.communicate(timeout=120) for process in processes]
        lines = [[line for line in out.decode().splitlines() if not line.startswith("[Gloo]")] for out, _ in said]
        assert [process.returncode for process in processes] == [0, 0], said[0][1][-2000:]
    finally:
        end(processes)
    assert lines[0][0].startswith("absent here: ValueError: ") and lines[0][1].startswith("no folder: ")
    assert lines[1][0] == "absent here: RuntimeError: process 0 of 2 failed here: see its own message"
    assert lines[1][1] == "no folder: RuntimeError: process 0 of 2 failed here: see its own message"
    assert "absent" in lines[0][1] and "nothing" not in lines[0][1]
    assert lines[0][2].startswith("in the way: FileExistsError: ") and "which would be lost" in lines[0][2]
    assert lines[1][2] == "in the way: RuntimeError: process 0 of 2 failed here: see its own message"
    assert lines[0][3] == lines[1][3] == "done"
    layer = ManifoldConstrainedHyperConnections(
        MHCConfig.from_dialect("deepseek-v4", streams=4, dim=16), rngs=nnx.Rngs(0)
    )
    expected = {name: np.asarray(value) for name, value in layer.weights().items()}
    layer.load_weights(tmp_path / "again.safetensors")
    for name, value in layer.weights().items():
        np.testing.assert_array_equal(value, expected[name])
    head = HyperHead(layer.config, rngs=nnx.Rngs(1))
    drawn = {name: np.asarray(value) for name, value in head.weights().items()}
    load_model(tmp_path / "model.safetensors", {"layers.0.": layer, "head.": head})
    for name, value in {**layer.weights(), **head.weights()}.items():
        np.testing.assert_array_equal(value, {**expected, **drawn}[name])


@pytest.mark.parametrize("prefix", ["", "layers.0."])
def test_one_process_agrees_with_itself(tmp_path, prefix):
    layer = ManifoldConstrainedHyperConnections(MHCConfig(streams=2, dim=4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        layer.load_weights(tmp_path / "absent.safetensors", prefix)

"""Files of GGUF and of torch that are nearly right."""

from __future__ import annotations

import functools
import io
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.conformance.fuzz.spoiling import Random, spoilt
from tests.conformance.porter.small_checkpoint import weights


def GGUF(name: str) -> str:
    return f"{name.replace('layers.', 'blk.').replace('hc_head', 'output_hc')}.weight"


def gguf(folder: Path, random_: Random) -> Path:
    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    values = {GGUF(name): value for name, value in weights(1).items()}
    keys = [
        (b"general.architecture", 8, string(b"deepseek4")), (b"deepseek4.block_count", 4, struct.pack("<I", 1)),
        (b"general.alignment", 4, struct.pack("<I", 32)), (b"tokens", 9, struct.pack("<IQ", 8, 2) + string(b"a") * 2),
        (b"nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 1) + bytes(4)),
    ]  # fmt: skip
    content = b"GGUF" + struct.pack("<IQQ", 3, len(values), len(keys))
    for name, kind, value in keys:
        content += string(name) + struct.pack("<I", kind) + value
    offset = 0
    for name, value in values.items():
        shape = value.shape[::-1]
        content += string(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        offset += -(-value.nbytes // 32) * 32
    content += bytes(-len(content) % 32)
    header = len(content)
    content += b"".join(value.tobytes().ljust(-(-value.nbytes // 32) * 32, b"\0") for value in values.values())
    head = spoilt(content[:header], random_)
    path = folder / "m.gguf"
    path.write_bytes(head + content[header:])
    return path


PIECES = [
    b"}q\x00", b"]q\x01", b"(", b"h\x00", b"s", b"u.", b"e", b"a", b"K\x01", b"M\xff\xff", b"N", b".",
    b"J\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x0f", b"j\x00\x00\x00\x00", b"X\x03\x00\x00\x00abc", b"\x8c\x01a", b"\x85", b"\x86", b"R", b"b",
    b"Q",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n", b"cos\nsystem\n",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x00", b"0", b"2", b"t", b"l",
    b"\x94",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"\x8b\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f",
]  # fmt: skip
"""Of pickles: opcodes with their arguments."""


def torch_file(folder: Path, random_: Random) -> Path:
    """A state dict whose pickle, records or archive are spoilt."""
    import torch

    file = io.BytesIO()
    state: dict[str, Any] = {name: torch.from_numpy(value) for name, value in weights(1).items()}
    names = list(state)
    how = random_.randrange(6)
    if how == 0:
        odd = [
            torch.ones(1).expand(2**34), torch.empty(3, device="meta"), torch.eye(3).to_sparse(), {}, [state], None, 1j,
            torch.ones(4, dtype=torch.complex64).conj(), torch.ones(2, 2).t(), torch.tensor([]), "x", float("nan"),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.ones(3)[1:],
            {1: {2: {3: torch.ones(1)}}},
            torch.ones(3, dtype=torch.bool), torch.nn.Parameter(torch.ones(2)),
            torch.ones(2).as_strided((2**20, 2**20), (0, 0)),
        ]  # fmt: skip
        state[random_.choice(names)] = random_.choice(odd)
    if how == 1:
        node: Any = state
        for _ in range(random_.choice([5, 60, 300])):
            node = {"a": node, "b": node} if random_.random() < 0.7 else [node]
        state = {"model": node}
    torch.save(state, file, _use_new_zipfile_serialization=random_.random() < 0.8)
    content = file.getvalue()
    path = folder / "x.pt"
    if how in (2, 3) and content[:2] == b"PK":
        content = _archive(content, random_)
    elif how >= 4:
        content = spoilt(content, random_)
    path.write_bytes(content)
    return path


def _archive(content: bytes, random_: Random) -> bytes:
    """The archive with another pickle, a record twice or compressed, or without one."""
    made, how = io.BytesIO(), random_.randrange(5)
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as other:
        records = archive.namelist()
        chosen = random_.choice(records)
        for name in records:
            data = archive.read(name)
            if name.endswith("data.pkl") and how <= 1:
                at = random_.randrange(len(data))
                pieces = b"".join(random_.choices(PIECES, k=random_.choice([1, 3, 20])))
                data = data[:at] + pieces + data[at + (len(pieces) if how else 0) :]
            if name == chosen and how == 2:
                data = spoilt(data, random_)
            if name == chosen and how == 3:
                other.writestr(name, bytes(1 << 22), zipfile.ZIP_DEFLATED)
                continue
            if name != chosen or how != 4:
                other.writestr(name, data)
    return made.getvalue()


def distributed(folder: Path, random_: Random) -> Path:
    """The metadata of a `torch.distributed.checkpoint`, as pickle opcodes."""
    saved = distributed_files()
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    start, chosen = saved[".metadata"], random_.choice(sorted(saved))
    pieces = b"".join(random_.choices(PIECES, k=random_.choice([1, 3, 30])))
    at, how = random_.randrange(len(start)), random_.randrange(4)
    if how == 0:
        (folder / ".metadata").write_bytes(start[:at] + pieces + start[at:])
    elif how == 1:
        (folder / ".metadata").write_bytes(start[:at] + pieces + start[at + len(pieces) :])
    elif how == 2:
        (folder / chosen).write_bytes(spoilt(saved[chosen], random_))
    else:
        old, new = random_.choice(
            [(b"K\x18", b"K\xff"), (b"K\x20", b"M\xff\xff"), (b"hc_attn", b"hc_attm"), (b"K\x03", b"N")]
        )
        (folder / ".metadata").write_bytes(start.replace(old, new, random_.choice([1, 5])))
    return folder


@functools.cache
def distributed_files() -> dict[str, bytes]:
    """The files of a checkpoint as torch writes it."""
    import torch
    import torch.distributed.checkpoint

    with tempfile.TemporaryDirectory() as folder:
        state = {name: torch.from_numpy(value) for name, value in weights(1).items()}
        library: Any = torch.distributed.checkpoint  # its functions aren't exported for a type checker
        library.save(state, checkpoint_id=folder, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

"""A result bundle: the files of runs with what they are of, in one file, so that a project can show what it passed.

It is a zip file. Its first member, ``manifest.json``, has the format, the corpus, what each implementation passed, and
name, size and SHA-256 of every other member; these are the files of the runs, as they were. The SHA-256 of the manifest
stands for all of it: who publishes it lets others check that a bundle is the one that was meant.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct, to_builtins

from conformance.cases.corpus import corpus_hash
from conformance.files import reading, temporary
from conformance.files.reading import Reader
from conformance.report import read
from conformance.report.read import ReportError, Run
from conformance.report.whole import Result, part, results

FORMAT = "mhc-conformance-bundle/1"
MANIFEST = "manifest.json"
MOST_RUNS = 64
LARGEST_FILE = 1 << 28
"""Bytes of a bundle; one of ten implementations that pass everything has a few million."""
LARGEST = 1 << 29
"""Bytes of all members together, unpacked."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member, so that the same runs make the same bundle."""
PIECE = 1 << 20


class Broken(ReportError):
    """A bundle that can be read, and isn't what it says; the message is one line for the user."""


class Member(Struct, frozen=True, forbid_unknown_fields=True):
    """A run's file: its name in the bundle, the one that it had, and its content's size and hash."""

    name: str
    file: str
    size: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds."""

    format: str
    corpus: str
    versions: tuple[dict[str, str], ...]
    """Of each run's packages."""
    results: tuple[Result, ...]
    members: tuple[Member, ...]
    part: str = ""
    """What the runs were asked for, where it isn't everything."""


READER = Reader(Manifest, "a bundle's manifest", Broken, FORMAT, largest=1 << 22)


@dataclass(frozen=True)
class Checked:
    """What a bundle was found to hold."""

    hash: str
    manifest: Manifest


def bundle(runs: Sequence[Run]) -> tuple[bytes, Checked]:
    """The bundle of some runs, and what it holds.

    Raises:
        ReportError: a run isn't whole or is of another corpus than the one at hand, or its file is no longer what was
            read, or too large.
    """
    found = results(runs)
    if len(runs) > MOST_RUNS:
        raise ReportError(f"expected at most {MOST_RUNS} runs in a bundle, got {len(runs)}")
    contents: list[bytes] = []
    for run in runs:
        contents.append(_read(run.path, LARGEST, "a run"))
        if sum(map(len, contents)) > LARGEST:
            raise ReportError(f"{run.path}: expected runs of at most {LARGEST} bytes together, got more")
    members = [
        Member(_name(number), run.path.name, len(content), hashlib.sha256(content).hexdigest())
        for number, (run, content) in enumerate(zip(runs, contents, strict=True), 1)
    ]
    manifest = to_builtins(_manifest(runs, found, members))
    parts = {MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}
    parts |= {member.name: content for member, content in zip(members, contents, strict=True)}
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in parts.items():
            archive.writestr(_info(name), content, compresslevel=9)
    result = target.getvalue()
    if len(result) > LARGEST_FILE:
        raise ReportError(f"expected a bundle of at most {LARGEST_FILE} bytes, got {len(result)}")
    return result, _opened(result, "the bundle of these runs")


def _info(name: str) -> zipfile.ZipInfo:
    """What the zip file says of a member besides its content."""
    info = zipfile.ZipInfo(name, EPOCH)
    info.compress_type, info.external_attr, info.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
    return info


def _read(path: Path, largest: int, what: str) -> bytes:
    """Raises `ReportError` where a file can't be read or is larger than that."""
    try:
        with reading.open_bytes(path) as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise ReportError(f"{path}: can't be read ({reading.reason(error)})") from error
    if len(content) > largest:
        raise ReportError(f"{path}: expected {what} of at most {largest} bytes, got more")
    return content


def _name(number: int) -> str:
    return f"run-{number}.jsonl"


def _manifest(runs: Sequence[Run], found: Sequence[Result], members: Sequence[Member]) -> Manifest:
    versions = tuple(run.header.versions for run in runs)
    return Manifest(FORMAT, runs[0].header.corpus, versions, tuple(found), tuple(members), part(runs))


def verify(path: Path, expected: str = "") -> Checked:
    """Checks a bundle: that it is whole, that nothing in it was changed, and that its runs say what it says.

    Args:
        expected: the hash that it should have; any where it is empty.

    Raises:
        Broken: it isn't what it says, is of another corpus than the one at hand, or has another hash.
        ReportError: it can't be read, is no zip file, or is too large.
    """
    return _opened(_read(path, LARGEST_FILE, "a bundle"), str(path), expected)


def _opened(content: bytes, place: str, expected: str = "") -> Checked:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ReportError(f"{place}: expected a bundle, a whole zip file ({reading.reason(error)})") from error
    with archive, temporary.within() as folder:
        try:
            return _checked(content, archive, folder, expected)
        except ReportError as error:
            raise Broken(f"{place}: {str(error).replace(f'{folder}/', '')}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error) as error:
            raise Broken(f"{place}: a member was changed ({reading.reason(error)})") from error


def _checked(content: bytes, archive: zipfile.ZipFile, folder: Path, expected: str) -> Checked:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if names[:1] != [MANIFEST] or len(names) > MOST_RUNS + 1:
        raise Broken(f"expected {MANIFEST} and at most {MOST_RUNS} runs, got {_listed(names)}")
    if sum(info.file_size for info in infos) > LARGEST:
        raise Broken(f"expected members of at most {LARGEST} bytes together, got more")
    text = b"".join(_pieces(archive, infos[0], READER.largest))
    found = hashlib.sha256(text).hexdigest()
    if expected and found != expected.lower():
        raise Broken(f"expected the hash {expected}, got {found}")
    manifest = READER.decode(text, MANIFEST)
    wanted = [_name(number) for number in range(1, len(manifest.members) + 1)]
    if [member.name for member in manifest.members] != wanted or names[1:] != wanted or not wanted:
        raise Broken(f"expected the members {_listed([MANIFEST, *wanted])}, got {_listed(names)}")
    for info, member in zip(infos[1:], manifest.members, strict=True):
        digest, size = hashlib.sha256(), 0
        with (folder / member.name).open("wb") as file:
            for piece in _pieces(archive, info, LARGEST):
                digest.update(piece)
                size += file.write(piece)
        if (size, digest.hexdigest()) != (member.size, member.sha256):
            raise Broken(f"{member.name} isn't the file that the manifest names: it was changed")
    _check_container(content, infos)
    runs = read.merge([folder / member.name for member in manifest.members])
    true = _manifest(runs, results(runs), manifest.members)
    for key in ("corpus", "versions", "results", "part"):
        if getattr(true, key) != getattr(manifest, key):
            raise Broken(f"the manifest has other {key} than the runs in it")
    if manifest.corpus != corpus_hash():
        raise Broken(f"of the corpus {manifest.corpus}, and the one at hand is {corpus_hash()}")
    return Checked(found, manifest)


def _check_container(content: bytes, infos: Sequence[zipfile.ZipInfo]) -> None:
    """That the zip file is what `bundle` makes of its members: nothing before, between, behind or beside them."""
    place, directory = 0, b""
    for info in infos:
        plain = _info(info.filename)
        plain.CRC, plain.compress_size, plain.file_size = info.CRC, info.compress_size, info.file_size
        local = plain.FileHeader(zip64=False)
        start, place = place + len(local), place + len(local) + info.compress_size
        if content[start - len(local) : start] != local or not _only_stream(content[start:place]):
            raise Broken(f"{info.filename}: its header was changed, or more stands behind it")
        directory += struct.pack(
            "<4s4B4HL2L5H2L", b"PK\1\2", plain.create_version, plain.create_system, plain.extract_version, 0, 0,
            plain.compress_type, *struct.unpack("<2H", local[10:14]), plain.CRC, plain.compress_size, plain.file_size,
            len(info.filename), 0, 0, 0, 0, plain.external_attr, start - len(local),
        ) + info.filename.encode()  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(infos), len(infos), len(directory), place, 0)
    if content[place:] != directory + end:
        raise Broken("there is more in the zip file than its members, or its directory was changed")


def _only_stream(content: bytes) -> bool:
    """Whether the compressed content ends where its place ends."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    while content and not stream.eof:
        stream.decompress(content, PIECE)
        content = stream.unconsumed_tail
    return stream.eof and not stream.unused_data


def _pieces(archive: zipfile.ZipFile, info: zipfile.ZipInfo, largest: int) -> Iterator[bytes]:
    """The content of a member, a piece at a time, and never more than it said that it has."""
    if info.file_size > largest:
        raise Broken(f"{info.filename}: expected at most {largest} bytes, got {info.file_size}")
    with archive.open(info) as file:
        while piece := file.read(PIECE):
            yield piece


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name)[:60] for name in names[:4]]
    return f"{', '.join(shown)}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" or "none"

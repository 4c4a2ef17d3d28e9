"""Where a report goes: links are followed, and what isn't a file is written through or refused, never replaced."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from conformance.files import atomic, through


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    atomic.write(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["real"]


def test_a_link_that_leads_nowhere_leads_to_the_new_file(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("new")
    atomic.write(link, b"content")
    assert link.is_symlink() and (tmp_path / "new").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["loop", "gone/file", "", "folder", "a" * 300])
def test_a_place_where_no_file_can_be_is_an_error_that_names_it(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        atomic.write(Path(name), "content")
    assert caught.value.filename == str(Path(name)) and caught.value.strerror
    assert {p.name for p in tmp_path.iterdir()} == {"loop", "folder"}


def test_a_long_name_has_a_temporary_one_that_is_no_longer(tmp_path):
    path = tmp_path / ("ü" * 127)
    atomic.write(path, "content")
    assert path.read_text() == "content"


def test_a_device_is_written_to_and_stays(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except OSError as error:
        pytest.skip(f"no device can be made: {error}")
    link = tmp_path / "link"
    link.symlink_to(device)
    for path in (device, link):
        try:
            atomic.write(path, "content")
        except PermissionError as error:
            pytest.skip(f"devices can't be opened here: {error}")
    assert stat.S_ISCHR(device.lstat().st_mode) and link.is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"null", "link"}


def test_a_full_device_is_an_error():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        atomic.write(Path("/dev/full"), "content")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    with pytest.raises(OSError, match="nobody reads"):
        atomic.write(tmp_path / "pipe", "content")
    assert time.monotonic() - began < 5 and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_pipe_takes_all_of_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content, read = "content" * 100_000, list[str]()
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    for _ in range(100):  # until the reader has opened it
        try:
            atomic.write(tmp_path / "pipe", content)
            break
        except OSError:
            time.sleep(0.05)
    reader.join(20)
    assert read == [content]


def test_a_pipe_whose_reader_takes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(through, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="nobody took anything"):
            atomic.write(tmp_path / "pipe", "x" * 1_000_000)
    finally:
        os.close(reader)


def test_a_descriptor_is_written_to_at_its_place(tmp_path):
    with (tmp_path / "out").open("wb", buffering=0) as file:
        file.write(b"before ")
        path = Path(f"/dev/fd/{file.fileno()}")
        if not path.exists():
            pytest.skip("there is no /dev/fd")
        atomic.write(path, "content ")
        file.write(b"after")
    assert (tmp_path / "out").read_text() == "before content after"


def test_a_directory_is_not_written_through(tmp_path):
    with (tmp_path / "out").open("wb") as file:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        if not path.exists():
            pytest.skip("there is no /proc")
        with pytest.raises(OSError, match="directory"), atomic.whole(path) as temporary:
            temporary.mkdir()

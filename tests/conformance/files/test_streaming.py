"""What is written as it comes goes to a file, behind its links, or through what stands for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conformance.files.streaming import Stream
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report.files import Lines


def test_each_text_is_there_at_once(tmp_path):
    path = tmp_path / "file"
    path.write_text("of another run, and longer")
    stream = Stream(path)
    stream.write("one\n")
    assert path.read_text() == "one\n"
    stream.write("two\n")
    stream.close()
    stream.close()
    more = Stream(path, more=True)
    more.write("three\n")
    more.close()
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    stream = Stream(link)
    stream.write("text")
    stream.close()
    assert link.is_symlink() and (tmp_path / "target").read_text() == "text"


def test_a_pipe_is_written_through_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    lines = Lines(pipe, "corpus")
    lines.add(Outcome("mine", "case", "reduce", "v", "float32", "paper", [Check("out", "passed", 0.5)]))
    lines.end()
    assert os.read(reading, 1 << 16).count(b"\n") == 4  # header, check, item, footer
    assert pipe.is_fifo()
    os.close(reading)


def test_a_device_stays_one():
    stream = Stream(Path("/dev/null"))
    stream.write("text")
    stream.close()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "make, saying",
    [(lambda path: os.mkfifo(path), "nobody reads"), (lambda path: path.mkdir(), "directory"),
     (lambda path: path.symlink_to(path), "symbolic links")],
    ids=["pipe", "directory", "loop"],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_and_not_waited_for(tmp_path, make, saying):
    make(tmp_path / "target")
    with pytest.raises(OSError, match=saying):
        Stream(tmp_path / "target")


def test_no_file_can_have_such_a_name():
    for name in ("a\0b", "\ud800"):
        with pytest.raises(OSError):
            Stream(Path(name))

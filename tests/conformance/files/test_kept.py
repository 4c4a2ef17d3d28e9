"""A cache that can't be used stops nobody, and the oldest files of a full one go."""

from __future__ import annotations

import os

from conformance.files import kept


def test_a_folder_that_another_process_has_removed_needs_no_room(tmp_path):
    kept.make_room(tmp_path / "removed", 1)


def test_the_oldest_go_until_half_is_left(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    kept.make_room(tmp_path, 30)
    assert len(list(tmp_path.iterdir())) == 3
    kept.make_room(tmp_path, 29)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]

"""Files of weights that several graphs have in common."""

import fcntl

from vocabtrim_export.lowering.graph_files import clone_file


def test_a_clone_is_a_file_of_its_own(tmp_path):
    source, place = tmp_path / "source", tmp_path / "place"
    source.write_bytes(b"weights" * 1000)
    clone_file(source, place)
    assert place.read_bytes() == source.read_bytes()
    assert (source.stat().st_nlink, place.stat().st_nlink) == (1, 1)
    place.write_bytes(b"other")
    assert source.read_bytes() == b"weights" * 1000


def test_a_file_system_that_shares_blocks_is_asked_first_and_then_nothing_is_copied(tmp_path, monkeypatch):
    source, place, asked = tmp_path / "source", tmp_path / "place", []
    source.write_bytes(b"weights")
    monkeypatch.setattr(fcntl, "ioctl", lambda descriptor, request, argument: asked.append(request))
    monkeypatch.delattr("shutil.copyfile")
    clone_file(source, place)
    assert asked == [(1 << 30) | (4 << 16) | (0x94 << 8) | 9]  # _IOW(0x94, 9, int), FICLONE

"""Both bundles take their places, or neither does."""

from pathlib import Path

import pytest

from vocabtrim_export.bundles.output import replacing


def tree(path):
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("old", [(), ("drafter",), ("target",), ("drafter", "target")])
@pytest.mark.parametrize("renames_that_work", range(5))
def test_a_rename_that_fails_undoes_the_others(old, renames_that_work, tmp_path, monkeypatch):
    paths = [tmp_path / "drafter", tmp_path / "target"]
    for name in old:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    before, rename, calls = tree(tmp_path), Path.rename, []

    def fail_once(self, target):
        calls.append(self)
        if len(calls) == renames_that_work + 1:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    try:
        with replacing(paths) as fresh:
            for path in fresh:
                (path / "file").write_text("new")
    except OSError:
        assert tree(tmp_path) == before
    else:
        assert renames_that_work >= len(calls)
        assert tree(tmp_path) == {"drafter/file": "new", "target/file": "new"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

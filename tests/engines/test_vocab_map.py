import numpy as np
import pytest
from safetensors.numpy import save_file

from engines import VocabMap, VocabtrimError


def test_a_map_and_its_inverse():
    vocab_map = VocabMap.from_ids([7, 2, 2, 5], 10)
    assert vocab_map.kept_token_ids.tolist() == [2, 5, 7]
    assert vocab_map.inverse.tolist() == [-1, -1, 0, -1, -1, 1, -1, 2, -1, -1]
    with pytest.raises(ValueError, match="read-only"):
        vocab_map.kept_token_ids[0] = 1


def test_digest_depends_on_ids_and_vocabulary():
    maps = [VocabMap.from_ids(ids, size) for ids, size in [([1, 2], 8), ([1, 3], 8), ([1, 2], 9), ([1], 8)]]
    assert len({vocab_map.digest for vocab_map in maps}) == 4
    assert maps[0] == VocabMap(np.array([1, 2], np.int32), 8)


@pytest.mark.parametrize("ids", [[], [-1, 2], [3, 10], [3, 3], [4, 2], [0.5]])
def test_what_is_no_map_is_refused(ids):
    with pytest.raises(VocabtrimError):
        VocabMap(np.array(ids), 10)


def test_files(tmp_path):
    vocab_map = VocabMap.from_ids([1, 5, 9], 10)
    path = tmp_path / "map.safetensors"
    path.write_bytes(vocab_map.to_bytes())
    assert VocabMap.load(path) == vocab_map
    save_file({"something": np.zeros(3)}, path)
    with pytest.raises(VocabtrimError, match="not a VocabMap file"):
        VocabMap.load(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(VocabtrimError, match="not a VocabMap file"):
        VocabMap.load(path)
    with pytest.raises(VocabtrimError, match="not a VocabMap file"):
        VocabMap.load(tmp_path / "none")

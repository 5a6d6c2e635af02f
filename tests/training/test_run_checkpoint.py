"""Checkpoints of a run are whole, or they are not there; damage of any byte is seen."""

import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.errors import CorruptCheckpointError
from fedbbpt_jax.training.checkpoint import MANIFEST, Checkpoint, check_sound, restore, save


class State(NamedTuple):
    params: dict
    turn: jax.Array
    key: jax.Array


def state(value: float) -> State:
    return State({"shift": jnp.full((2, 3), value)}, jnp.asarray(7, jnp.int32), jax.random.key_data(jax.random.key(1)))


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, Checkpoint(step, state(step / 10), {"rows": [{"round": step, "loss": 0.1 + step}]}))
    return tmp_path


def test_the_last_two_are_kept(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_what_was_saved_comes_back_bit_for_bit(folder):
    found = restore(folder, state(0.0))
    assert (found.step, found.progress) == (3, {"rows": [{"round": 3, "loss": 3.1}]})
    assert jax.tree.structure(found.arrays) == jax.tree.structure(state(0.0))
    for a, b in zip(jax.tree.leaves(found.arrays), jax.tree.leaves(state(3 / 10)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_nothing_is_restored_from_nothing(tmp_path):
    assert restore(tmp_path / "absent", state(0.0)) is None
    assert restore(tmp_path, state(0.0)) is None


def test_a_step_without_a_manifest_was_never_finished(folder):
    (folder / "3" / MANIFEST).unlink()
    assert restore(folder, state(0.0)).step == 2
    save(folder, Checkpoint(3, state(0.5), {}))  # it is written again
    assert restore(folder, state(0.0)).arrays.params["shift"][0, 0] == 0.5


@pytest.mark.filterwarnings("ignore")  # Orbax tells of what it misses
def test_an_end_while_an_old_one_was_removed(folder):
    (folder / "2" / MANIFEST).unlink()
    (folder / "2" / "_CHECKPOINT_METADATA").unlink()
    assert restore(folder, state(0.0)).step == 3
    assert sorted(place.name for place in folder.iterdir()) == ["3"]


def test_a_damaged_one_is_named_and_the_one_before_is_taken(folder):
    (path,) = (folder / "3").rglob("rest/metadata")
    path.write_bytes(path.read_bytes().replace(b"3.1", b"3.2"))
    with pytest.warns(UserWarning, match=r"checkpoint .*3 is damaged: .*rest"):
        assert restore(folder, state(0.0)).step == 2


def test_where_all_are_damaged_nothing_is_made_up(folder):
    for step in "23":
        (folder / step / MANIFEST).write_text("{}")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CorruptCheckpointError, match="all checkpoints"):
        restore(folder, state(0.0))


@pytest.mark.parametrize("other", [state(0.0)._replace(turn=jnp.zeros(4)), {"shift": jnp.zeros((2, 3))}])
def test_another_run_is_refused(folder, other):
    with pytest.raises(CorruptCheckpointError, match="of another run"):
        restore(folder, other)


@pytest.mark.slow
def test_every_changed_byte_and_every_truncation_is_seen(folder, tmp_path):
    place = folder / "3"
    check_sound(place)
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            with pytest.raises(CorruptCheckpointError, match="is damaged"):
                check_sound(place)
            path.write_bytes(content[:at])
            with pytest.raises(CorruptCheckpointError, match="is damaged"):
                check_sound(place)
        path.write_bytes(content)
    check_sound(place)
    shutil.copy(place / MANIFEST, place / "arrays" / "one-more")
    with pytest.raises(CorruptCheckpointError, match="one-more"):
        check_sound(place)

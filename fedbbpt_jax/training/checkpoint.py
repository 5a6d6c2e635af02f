"""What a run needs to go on after an end that nobody chose: written whole or not at all, and checked before it is used.

Orbax writes a step under another name and renames it; then a manifest with the SHA-256 of each of its files is added
the same way. A step without a manifest was never finished and counts for nothing. The two newest steps are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fedbbpt_jax.errors import CorruptCheckpointError
from fedbbpt_jax.types import PyTree

MANIFEST = "manifest.json"
NUM_KEPT = 2


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
      step: its number; of a run, that of the segments that were played.
      arrays: such as the server's state.
      progress: the rest, as JSON.
    """

    step: int
    arrays: PyTree
    progress: Any


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint into a folder of its own number, and removes those before the last two.

    Args:
      folder: of the checkpoints of one run; made if it is not there.
      checkpoint: of a step that the folder does not hold yet.
    """
    step, arrays, progress = checkpoint
    rest = {"layout": _layout(arrays), "progress": progress}
    with _manager(folder) as manager:
        arrays = ocp.args.StandardSave(jax.tree.map(np.asarray, arrays))
        manager.save(step, args=ocp.args.Composite(arrays=arrays, rest=ocp.args.JsonSave(rest)))
    place = folder / str(step)
    unfinished = place / f"{MANIFEST}.unfinished"
    with unfinished.open("wb") as file:
        file.write(_manifest(place))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(place / MANIFEST)
    _sync_folder(place)


def restore(folder: Path, like: PyTree) -> Checkpoint | None:
    """Returns the newest checkpoint that is as it was written; None where none was ever finished.

    One that is damaged is named in a warning, and the one before it is taken. What is newer than the one that is taken
    is removed: it will be written again. So is what was being written or removed when the process ended.

    Args:
      folder: of the checkpoints of one run.
      like: arrays of the shapes and in the structure of those that were saved.

    Raises:
      CorruptCheckpointError: all are damaged, or they are of another run.
    """
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        sound = _newest_sound(folder, manager)
        for step in manager.all_steps():
            if sound is None or step > sound or not (folder / str(step) / MANIFEST).exists():
                manager.delete(step)
        if sound is None:
            return None
        found = _rest(manager, sound)
        if found["layout"] != _layout(like):
            raise CorruptCheckpointError(f"checkpoint {folder / str(sound)} is of another run than this one")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype), like)
        arrays = manager.restore(sound, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes)))["arrays"]
    return Checkpoint(sound, jax.tree.map(jnp.asarray, arrays), found["progress"])


def read_progress(folder: Path) -> Any | None:
    """Returns the progress of the checkpoint that `restore` would take; None where there is none.

    Raises:
      CorruptCheckpointError: all are damaged.
    """
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        sound = _newest_sound(folder, manager)
        return None if sound is None else _rest(manager, sound)["progress"]


def check_sound(place: Path) -> None:
    """Raises CorruptCheckpointError where a finished checkpoint is not, byte for byte, what was written."""
    expected, found = _manifest(place), (place / MANIFEST).read_bytes()
    if found != expected:
        told, are = (set(text.decode(errors="replace").splitlines()) for text in (found, expected))
        raise CorruptCheckpointError(f"checkpoint {place} is damaged: {', '.join(sorted(told ^ are))}")


def _newest_sound(folder: Path, manager: ocp.CheckpointManager) -> int | None:
    steps = sorted(manager.all_steps(), reverse=True)
    finished = [step for step in steps if (folder / str(step) / MANIFEST).exists()]
    sound = next((step for step in finished if _is_sound(folder / str(step))), None)
    if sound is None and finished:
        raise CorruptCheckpointError(f"all checkpoints in {folder} are damaged: {finished}")
    return sound


def _rest(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(rest=ocp.args.JsonRestore()))["rest"]


def _is_sound(place: Path) -> bool:
    try:
        check_sound(place)
    except CorruptCheckpointError as error:
        warnings.warn(f"{error}; the one before it is taken", stacklevel=2)
        return False
    return True


def _manifest(place: Path) -> bytes:
    """Returns what the manifest of a step has to be: a line for each file, in order."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    hashes = {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return (json.dumps(hashes, indent=1) + "\n").encode()


def _layout(arrays: PyTree) -> dict[str, str]:
    """Returns the type and shape of each array by its place, which Orbax does not insist on."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): f"{jnp.asarray(x).dtype}{list(jnp.shape(x))}" for path, x in leaves}


def _manager(folder: Path) -> ocp.CheckpointManager:
    """Returns Orbax's manager, which does without the other processes of a run: one of them writes for all."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"{own}"
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=NUM_KEPT, enable_async_checkpointing=False, create=False, multiprocessing_options=alone
    )
    folder.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _sync_folder(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

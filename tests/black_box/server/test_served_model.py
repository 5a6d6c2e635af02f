"""The fingerprint of a served model, and the queue that gathers rows."""

import asyncio
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear_box
from serving import linear, vectors

from fedbbpt_jax.black_box.frozen import clip_classifier
from fedbbpt_jax.black_box.rows import cut_query, in_rows
from fedbbpt_jax.black_box.server.batcher import Batcher, QueueFullError
from fedbbpt_jax.black_box.server.served_model import fingerprint_of, served_model, tensor_specs
from fedbbpt_jax.models.loading import load_clip
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query, Response

ONE = Query(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2), np.float32))


def weighted(weights, query):
    return Response((query.prompt[:, :, None] + query.inputs[:, None]) * weights, jnp.array(True))


def box_of(*weights):
    return jax.tree_util.Partial(weighted, jnp.float32(weights))


def cut_of(seed, num_prompts, num_examples):
    tensors = vectors(num_prompts, num_examples, seed)
    query = Query(tensors["prompt"][None], tensors["inputs"][None])
    return query, cut_query(query, linear().rows.like)


def test_a_fingerprint_tells_weights_precision_and_shape_apart():
    same = fingerprint_of(box_of(1, 2), ONE, "highest", 4)
    assert same == fingerprint_of(box_of(1, 2), ONE, "highest", 4)
    others = [
        fingerprint_of(box_of(1, np.nextafter(np.float32(2), np.float32(3))), ONE, "highest", 4),
        fingerprint_of(box_of(1, 2), ONE, "bfloat16", 4),
        fingerprint_of(box_of(1, 2), ONE, "highest", 8),
        fingerprint_of(box_of(1, 2), jax.tree.map(lambda x: x.astype(np.int32), ONE), "highest", 4),
    ]
    assert len({same, *others}) == 5
    assert len(same) == 64


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_another_process():
    code = (
        "import numpy as np; from fedbbpt_jax import MINI_CLIP, load_clip, clip_classifier;"
        "from fedbbpt_jax.black_box.server.served_model import fingerprint_of; from fedbbpt_jax.types import Query;"
        "x = np.zeros((1, 1, 32, 32, 3), np.float32);"
        "print(fingerprint_of(clip_classifier(load_clip(MINI_CLIP), ('one', 'two')), Query(x, x), 'highest', 4))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    x = np.zeros((1, 1, 32, 32, 3), np.float32)
    box = clip_classifier(load_clip(MINI_CLIP), ("one", "two"))
    assert fingerprint_of(box, Query(x, x), "highest", 4) == other


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ä"])
def test_a_name_fits_in_an_address(name):
    with pytest.raises(ValueError, match="name of a served model"):
        served_model(name, box_of(1, 2), ONE, ("a", "b"))


def test_every_class_has_a_name():
    with pytest.raises(ValueError, match="each of 2 classes"):
        served_model("m", box_of(1, 2), ONE, ("a",))


def test_tensors_are_told():
    assert tensor_specs(linear()) == [
        {"name": "prompt", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "inputs", "datatype": "FP32", "shape": [-1, 4]},
    ]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_answers_do_not_depend_on_who_asks_at_the_same_time(num_threads):
    """Sizes that do and do not fill batches, all at once: every answer is the one that it gets alone, bitwise."""
    asked = [cut_of(seed, 1 + seed % 3, 1 + seed % 5) for seed in range(20)]
    batches = []

    async def all_at_once():
        batcher = Batcher(linear().rows, 1000, batches.append, num_threads)
        found = await asyncio.gather(*(batcher.answer(cut) for _, cut in asked))
        await batcher.close()
        return found

    alone = in_rows(jax.tree_util.Partial(linear_box), linear().rows.like, 4)
    for (query, _), scores in zip(asked, asyncio.run(all_at_once()), strict=True):
        np.testing.assert_array_equal(scores.reshape(alone(query).scores.shape), alone(query).scores)
    num_rows = sum(len(cut.prompt_of_row) for _, cut in asked)
    assert sum(batch.count for batch in batches) == num_rows
    if num_threads == 1:
        assert len(batches) == -(-num_rows // 4)  # nobody waits beside an empty place


def test_a_full_queue_says_when_to_come_again():
    async def too_many():
        batcher = Batcher(linear().rows, 6)
        (_, five), (_, two) = cut_of(0, 1, 5), cut_of(1, 1, 2)
        first = asyncio.ensure_future(batcher.answer(five))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await batcher.answer(two)
        assert full.value.retry_after > 0
        await first
        await batcher.answer(two)
        assert batcher.num_waiting == 0
        await batcher.close()

    asyncio.run(too_many())


def test_a_failure_reaches_its_own_and_the_next_is_answered():
    def fails_once(*_, failed=[]):  # noqa: B006
        failed.append(1)
        if len(failed) == 1:
            raise RuntimeError("out of memory")
        return np.ones((4, 1, 4), np.float32)

    async def twice():
        batcher = Batcher(linear().rows._replace(compute=fails_once), 100)
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher.answer(cut_of(0, 2, 5)[1])
        assert (await batcher.answer(cut_of(0, 1, 1)[1]) == 1).all()
        assert batcher.num_waiting == 0
        await batcher.close()

    asyncio.run(twice())

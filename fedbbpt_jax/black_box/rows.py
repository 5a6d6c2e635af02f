"""A box asked row by row, in one program of fixed shape, so that an answer does not depend on its batch mates.

A row is one prompt on one example (or on a small fixed block of examples, where the cost is that of the prompt). Any
query is cut into rows, which are computed `num_rows` at a time, the last of them padded. On a CPU the program loops
over the rows: each is computed by the same instructions wherever it stands, and only as many as there are. One matrix
product of all rows would not promise that (rows at the edge of a tile may be summed in another order), and is no faster
there: a small CLIP on two cores answers 3,600 rows per second one by one, 2,600 in products of 32 and 2,400 of 8. On an
accelerator all rows are computed at once.

What is served and what is compared with it in-process ask through this one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.types import BlackBox, PyTree, Query, Response

RowProgram = Callable[[PyTree, PyTree, int], np.ndarray]
"""`(prompts [R, ...], inputs [R, b, ...], how many rows count) -> scores float32 [R, b, N]`."""


class Cut(NamedTuple):
    """A query as rows: what there is of prompts and inputs, and which of them each row takes.

    Attributes:
      prompts: `[M, ...]`.
      blocks: of b examples each, `[L, b, ...]`.
      prompt_of_row: of M, int `[n]`.
      block_of_row: of L, int `[n]`.
    """

    prompts: PyTree
    blocks: PyTree
    prompt_of_row: np.ndarray
    block_of_row: np.ndarray


def in_rows(box: BlackBox, like: Query, num_rows: int) -> BlackBox:
    """Returns a box on the host that gives each row the same bits, whatever else is asked with it.

    Args:
      box: a pytree, whose weights enter the program as arguments.
      like: a query of one row, which tells shapes and types: prompt `[1, 1, ...]` and inputs `[1, b, ...]`. Rows of
        pictures have b = 1.
      num_rows: R, computed at a time.

    Raises:
      ValueError: there are no rows; when called: a query is of other shapes or types than `like`.

    Example:
      >>> box = jax.tree_util.Partial(lambda q: Response(q.prompt[:, :, None] + q.inputs[:, None], jnp.array(True)))
      >>> one = Query(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2), np.float32))
      >>> ask = in_rows(box, one, num_rows=4)
      >>> ask(Query(np.ones((1, 3, 2), np.float32), np.ones((1, 5, 2), np.float32))).scores.shape
      (1, 3, 5, 2)
    """
    compute = row_program(box, like, num_rows)

    def ask(query: Query, /) -> Response:
        num_clients, num_candidates = jax.tree.leaves(query.prompt)[0].shape[:2]
        batch = jax.tree.leaves(query.inputs)[0].shape[1]
        cut = cut_query(query, like)
        scores = np.concatenate([compute(*part)[: part[2]] for part in parts_of(cut, num_rows)])  # [n, b, N]
        scores = scores.reshape(num_clients, num_candidates, -1, scores.shape[-1])[:, :, :batch]
        return Response(scores, np.isfinite(scores).all(-1))  # type: ignore[arg-type]

    return ask


def row_program(box: BlackBox, like: Query, num_rows: int, at_once: int | None = None) -> RowProgram:
    """Returns what computes up to `num_rows` rows, compiled once.

    Args:
      box: as for `in_rows`.
      like: as for `in_rows`.
      num_rows: R.
      at_once: rows of one step, a divisor of R; if left out, 1 on a CPU and R on an accelerator.

    Raises:
      ValueError: there are no rows, or steps do not divide them.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    at_once = at_once or (1 if jax.default_backend() == "cpu" else num_rows)
    if num_rows % at_once:
        raise ValueError(f"at_once must divide {num_rows} rows, got {at_once}")
    num_classes = num_scores(box, like)
    block = jax.tree.leaves(like.inputs)[0].shape[1]

    @jax.jit
    def run(box: BlackBox, prompts: PyTree, inputs: PyTree, count: jax.Array) -> jax.Array:
        def some(step: jax.Array, scores: jax.Array) -> jax.Array:
            def taken(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, step * at_once, at_once)

            query = Query(jax.tree.map(lambda x: taken(x)[:, None], prompts), jax.tree.map(taken, inputs))
            found = box(query).scores[:, 0]  # [at_once, b, N]
            return jax.lax.dynamic_update_slice_in_dim(scores, found, step * at_once, 0)

        nothing = jnp.zeros((num_rows, block, num_classes), jnp.float32)
        return jax.lax.fori_loop(0, -(-count // at_once), some, nothing)

    return lambda prompts, inputs, count: np.asarray(run(box, prompts, inputs, np.int32(count)))


def num_scores(box: BlackBox, like: Query) -> int:
    """Returns N, the classes that a box scores."""
    return jax.eval_shape(lambda box, query: box(query), box, like).scores.shape[-1]


def cut_query(query: Query, like: Query) -> Cut:
    """Returns a query as rows, in the order of clients, candidates and examples.

    A row is of one client, so that inputs of several stay apart. Texts (whole numbers or bool `[C, B, T]`) may be
    shorter than those of `like`, and are padded with zeros.

    Raises:
      ValueError: a prompt or an input is of another shape or type than that of `like`, or not of the same clients.
    """
    inputs = jax.tree.map(lambda x, one: _padded(np.asarray(x), one.shape[2:]), query.inputs, like.inputs)
    num_clients, batch = _axes("inputs", inputs, like.inputs)
    per_example = jax.tree.leaves(query.prompt)[0].ndim == jax.tree.leaves(like.prompt)[0].ndim + 1
    prompts = jax.tree.map(np.asarray, query.prompt)
    flat = (
        jax.tree.map(lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), prompts)
        if per_example
        else prompts
    )
    clients, per_client = _axes("prompt", flat, like.prompt)
    block = jax.tree.leaves(like.inputs)[0].shape[1]
    if clients != num_clients or (per_example and (block > 1 or jax.tree.leaves(prompts)[0].shape[2] != batch)):
        raise ValueError(f"the prompts are not of the {num_clients} clients and {batch} examples of the inputs")
    num_blocks = -(-batch // block)
    of_block = np.minimum(np.arange(num_blocks * block), batch - 1)
    blocks = jax.tree.map(lambda x: x[:, of_block].reshape(-1, block, *x.shape[2:]), inputs)  # [C*L, b, ...]
    num_candidates = per_client // batch if per_example else per_client
    c, k, b = (x.ravel() for x in np.indices((num_clients, num_candidates, num_blocks)))
    of_row = (c * num_candidates + k) * batch + b if per_example else c * num_candidates + k
    merged = jax.tree.map(lambda x: x.reshape(clients * per_client, *x.shape[2:]), flat)
    return Cut(merged, blocks, of_row, c * num_blocks + b)


def parts_of(cut: Cut, num_rows: int) -> Iterator[tuple[PyTree, PyTree, int]]:
    """Yields the arguments of a `RowProgram` until every row was given; what is too little is padded."""
    for start in range(0, len(cut.prompt_of_row), num_rows):
        prompts, blocks = (x[start : start + num_rows] for x in (cut.prompt_of_row, cut.block_of_row))
        yield (*rows_of([(cut, prompts, blocks)], num_rows), len(prompts))


def rows_of(taken: list[tuple[Cut, np.ndarray, np.ndarray]], num_rows: int) -> tuple[PyTree, PyTree]:
    """Returns prompts and inputs `[R, ...]` of rows of one or several cuts, padded with zeros.

    Args:
      taken: cuts, and which of their prompts and blocks.
      num_rows: R.
    """

    def gathered(trees: list[PyTree], rows: list[np.ndarray]) -> PyTree:
        def leaf(*leaves: np.ndarray) -> np.ndarray:
            found = np.zeros((num_rows, *leaves[0].shape[1:]), leaves[0].dtype)
            start = 0
            for x, own in zip(leaves, rows, strict=True):
                np.take(x, own, axis=0, out=found[start : start + len(own)], mode="clip")
                start += len(own)
            return found

        return jax.tree.map(leaf, *trees)

    cuts = [cut for cut, _, _ in taken]
    prompts = gathered([cut.prompts for cut in cuts], [rows for _, rows, _ in taken])
    return prompts, gathered([cut.blocks for cut in cuts], [rows for _, _, rows in taken])


def is_text(x: np.ndarray) -> bool:
    """Returns whether inputs are texts, `[C, B, T]` of token ids or of what is attended."""
    return x.ndim == 3 and x.dtype.kind in "iub"


def _padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns shorter texts at the length of those that a box was compiled for; anything else as it is."""
    if not is_text(x) or len(shape) != 1 or x.shape[2] >= shape[0]:
        return x
    return np.pad(x, ((0, 0), (0, 0), (0, shape[0] - x.shape[2])))


def _axes(name: str, tree: PyTree, like: PyTree) -> tuple[int, int]:
    """Returns the two leading axes that all leaves of a tree have.

    Raises:
      ValueError: they have not the same ones, none of an axis, or are of other shapes or types than `like`.
    """
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True))
    for x, one in pairs:
        if x.shape[2:] != one.shape[2:] or x.ndim != one.ndim or x.dtype != one.dtype:
            raise ValueError(
                f"{name}: expected {one.dtype} of shape {list(one.shape[2:])} each, got {x.dtype} {list(x.shape[2:])}"
            )
    axes = {x.shape[:2] for x, _ in pairs}
    if len(axes) != 1 or 0 in next(iter(axes)):
        raise ValueError(f"{name}: expected at least one, and as many in every part, got {sorted(axes)}")
    return next(iter(axes))

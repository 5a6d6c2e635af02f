"""White-box prompt tuning, by autodiff through the frozen model: a ceiling for research, not a black-box method."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from jax import Array

from fedbbpt_jax.types import BlackBox, Examples, Objective, Params, PromptGenerator, Query


def compile_white_box(
    generator: PromptGenerator, objective: Objective, *, num_steps: int, learning_rate: float
) -> Callable[[BlackBox, Params, Examples], Params]:
    """Returns a compiled `(classifier, initial params, examples) -> params`: Adam on the exact gradient.

    The classifier must be differentiable, that is, not behind `query_only`.

    Args:
      generator: the prompt's form, the same as the black-box method's.
      objective: the loss.
      num_steps: Adam steps, each on all examples; the step size decays by a cosine.
      learning_rate: of the first step.
    """
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    @jax.jit
    def tune(classifier: BlackBox, params: Params, examples: Examples) -> Params:
        def loss(params: Params) -> Array:
            prompt = generator.generate(params, examples.features)
            query = Query(
                jax.tree.map(lambda x: x[None, None], prompt), jax.tree.map(lambda x: x[None], examples.inputs)
            )
            return objective(classifier(query).scores[0, 0], examples.labels).mean()

        def step(carry, _):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[0][0]

    return tune

"""White-box prompt tuning, by autodiff through the frozen model: ceilings for research, not black-box methods.

The classifier must be differentiable, that is, not behind `query_only`.
"""

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
            return _losses(generator, objective, classifier, params, examples).mean()

        def step(carry, _):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[0][0]

    return tune


def compile_federated_white_box(
    generator: PromptGenerator, objective: Objective, *, num_rounds: int, local_steps: int, learning_rate: float
) -> Callable[[BlackBox, Params, Examples, Array], Params]:
    """Returns a compiled `(classifier, initial params, examples [n], held [C, n]) -> params`: FedAvg of local Adam.

    Clients weigh as many examples as they hold, which `held` (bool) says; their moments stay with them.

    Source: Zhao et al., 2023, "FedPrompt: Communication-Efficient and Privacy Preserving Prompt Tuning in Federated
    Learning" (with SGD there).

    Args:
      generator: the prompt's form, the same as the black-box method's.
      objective: the loss.
      num_rounds: R.
      local_steps: T, each on all examples of a client; the step size decays by a cosine over all steps.
      learning_rate: of the first step.
    """
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, num_rounds * local_steps))

    @jax.jit
    def tune(classifier: BlackBox, params: Params, examples: Examples, held: Array) -> Params:
        def loss(params: Params, own: Array) -> Array:
            return (_losses(generator, objective, classifier, params, examples) * own).sum() / own.sum()

        def step(carry, own: Array):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params, own), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def local(params: Params, opt_state: optax.OptState, own: Array):
            return jax.lax.fori_loop(0, local_steps, lambda _, carry: step(carry, own), (params, opt_state))

        def one_round(carry, _):
            params, opt_states = carry
            clients, opt_states = jax.vmap(local, (None, 0, 0))(params, opt_states, held.astype("float32"))
            weights = held.sum(1) / held.sum()
            params = jax.tree.map(lambda x: (weights @ x.reshape(len(x), -1)).reshape(x.shape[1:]), clients)
            return (params, opt_states), None

        opt_states = jax.vmap(lambda own: tx.init(params))(held)
        return jax.lax.scan(one_round, (params, opt_states), length=num_rounds)[0][0]

    return tune


def _losses(
    generator: PromptGenerator, objective: Objective, classifier: BlackBox, params: Params, examples: Examples
) -> Array:
    """Returns the loss of each example, `[B]`."""
    prompt = generator.generate(params, examples.features)
    query = Query(jax.tree.map(lambda x: x[None, None], prompt), jax.tree.map(lambda x: x[None], examples.inputs))
    return objective(classifier(query).scores[0, 0], examples.labels)

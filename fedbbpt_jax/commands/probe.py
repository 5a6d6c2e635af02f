"""`fedbbpt probe`: what a black box is like to ask, before a run pays for finding out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import tyro
from rich.console import Console

from fedbbpt_jax.commands.output import write_json_to
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.probing import Probed, probed
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.resolve import requests_per_round, resolve


@dataclass(frozen=True)
class Probe:
    """Asks the black box of an experiment about 60 times: noise, rounding, company, order, speed; and which size suits.

    Attributes:
      target: the address of a server, http://..., or a model, as for --model; those of the options if left out.
      experiment: whose black box is asked, and whose cost is told.
      json: write the findings as JSON to this file, - for standard output.
      quiet: print nothing but errors.
    """

    target: tyro.conf.Positional[str | None] = None
    experiment: tyro.conf.OmitArgPrefixes[Experiment] = field(default_factory=Experiment)
    json: str | None = None
    quiet: bool = False


def probe_command(command: Probe) -> int:
    """Prints what was found, and what the experiment would cost."""
    experiment = aimed(command)
    found, e = probed(experiment), resolve(experiment)
    num_requests = e.num_rounds * requests_per_round(e)
    messages = e.num_rounds * e.cohort * e.local_steps
    seconds = messages * found.character.seconds / min(found.character.concurrency, e.cohort)
    row = {**found.character._asdict(), **found._asdict(), "run_requests": num_requests, "run_seconds": seconds}
    del row["character"]
    console = Console(quiet=command.quiet, stderr=True)
    for line in lines(found, row):
        console.print(line, highlight=False)
    if command.json is not None:
        write_json_to(command.json, row)
    return 0


def aimed(command: Probe) -> Experiment:
    """Returns the experiment with the target in its place."""
    if command.target is None:
        return command.experiment
    is_address = command.target.startswith(("http://", "https://"))
    return replace(command.experiment, **{"url" if is_address else "model": command.target})


def lines(found: Probed, row: Row) -> list[str]:
    """Returns findings as lines for people."""
    c = found.character
    return [
        f"asked again: {c.num_distinct} different answers, deviation {c.noise:.2g} of a score",
        f"scores are multiples of {c.quantum:.2g}; {100 * c.unusable:.1f} % of them are not usable",
        f"asked together and alone differ by {c.alone_or_together:.2g}, in another order by {c.order:.2g}",
        f"{c.seconds:.3f} seconds for a message; {c.concurrency} at once are as fast as more",
        f"its mean loss deviates by {found.loss_deviation:.2g} nats",
        *([] if found.num_tops is None else [f"an answer tells of {found.num_tops} first tokens or more"]),
        *(
            []
            if found.perturbation_size is None
            else [f"third derivative {found.third_derivative:.2g}: --perturbation-size {found.perturbation_size:.3g}"]
        ),
        f"asked {found.num_requests:,} requests; the run would be {row['run_requests']:,}, "
        f"at least {row['run_seconds']:.0f} seconds of answers",
    ]

"""`fedbbpt probe`: what a black box is like to ask, before a run pays for finding out."""

from __future__ import annotations

from dataclasses import dataclass, field

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
      experiment: whose black box is asked, and whose cost is told; --url names a served one.
      json: write the findings as JSON to this file, - for standard output.
      quiet: print nothing but errors.
    """

    experiment: tyro.conf.OmitArgPrefixes[Experiment] = field(default_factory=Experiment)
    json: str | None = None
    quiet: bool = False


def probe_command(command: Probe) -> int:
    """Prints what was found, and what the experiment would cost."""
    found, e = probed(command.experiment), resolve(command.experiment)
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


def lines(found: Probed, row: Row) -> list[str]:
    """Returns findings as lines for people."""
    c = found.character
    return [
        f"asked again: {c.num_distinct} different answers, deviation {c.noise:.2g} of a score",
        f"scores are multiples of {c.quantum:.2g}; {100 * c.unusable:.1f} % of them are not usable",
        f"asked together and alone differ by {c.alone_or_together:.2g}, in another order by {c.order:.2g}",
        f"{c.seconds:.3f} seconds for a message; {c.concurrency} at once are as fast as more",
        f"its mean loss deviates by {found.loss_deviation:.2g} nats; third derivative {found.third_derivative:.2g}",
        f"--perturbation-size {found.perturbation_size:.3g}",
        f"asked {found.num_requests:,} requests; the run would be {row['run_requests']:,}, "
        f"at least {row['run_seconds']:.0f} seconds of answers",
    ]

"""What a run will cost, before anything of it is asked."""

from __future__ import annotations

from fedbbpt_jax.training.chunk_size import seconds_of_answers
from fedbbpt_jax.training.prepare import Setup
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.resolve import requests_per_round


def forecast(setup: Setup) -> Row:
    """Returns what the rounds of a run cost if every client that is drawn comes.

    Seconds are those of the answers, without compilation and evaluations: those of one chunk, which is asked and timed
    for it, times the number of chunks.
    """
    e = setup.experiment
    in_flight = e.chunk_size * e.batch_size
    seconds = seconds_of_answers(setup.box, setup.programs.method, setup.task.train, in_flight) / in_flight
    num_requests = e.num_rounds * requests_per_round(e)
    down, up = (e.num_rounds * e.cohort * of_one for of_one in setup.payload)
    return {
        "num_rounds": e.num_rounds,
        "num_evaluations": num_requests // e.batch_size,
        "num_requests": num_requests,
        "downlink_bytes": down,
        "uplink_bytes": up,
        "seconds": num_requests * seconds / setup.programs.num_shards,
    }


def forecast_line(cost: Row) -> str:
    """Returns a forecast as a line for people.

    Example:
      >>> counts = {"num_rounds": 2, "num_requests": 1600, "downlink_bytes": 900, "uplink_bytes": 800}
      >>> forecast_line({**counts, "seconds": 61.0})
      'would cost 1,600 requests in 2 rounds, 900 bytes down and 800 up, about 1.0 minutes of answers'
    """
    seconds = cost["seconds"]
    spell = f"{seconds:.0f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"
    asked = f"{cost['num_requests']:,} requests in {cost['num_rounds']:,} rounds"
    sent = f"{cost['downlink_bytes']:,} bytes down and {cost['uplink_bytes']:,} up"
    return f"would cost {asked}, {sent}, about {spell} of answers"

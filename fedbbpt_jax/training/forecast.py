"""What a run will cost, before anything of it is asked."""

from __future__ import annotations

from fedbbpt_jax.black_box.ledger.costs import Cost
from fedbbpt_jax.training.chunk_size import seconds_of_answers
from fedbbpt_jax.training.plain_texts import tokens_of_a_request
from fedbbpt_jax.training.prepare import Setup
from fedbbpt_jax.training.progress import Row
from fedbbpt_jax.training.resolve import requests_per_round
from fedbbpt_jax.training.served import num_eval_requests, price_of


def forecast(setup: Setup) -> Row:
    """Returns what the rounds of a run cost if every client that is drawn comes.

    Tokens, evaluation included, are guessed from the length of the texts, and so is the money for them; None where
    nobody counts them.

    Seconds are those of the answers, without compilation and evaluations: those of one chunk, which is asked and timed
    for it, times the number of chunks; None for a served model, which is not asked (`fedbbpt probe` does that).
    """
    e = setup.experiment
    num_requests, evaluation = e.num_rounds * requests_per_round(e), num_eval_requests(e, setup.task)
    tokens = 0 if e.served.api == "v2" else round((num_requests + evaluation) * tokens_of_a_request(e))
    down, up = (e.num_rounds * e.cohort * of_one for of_one in setup.payload)
    return {
        "num_rounds": e.num_rounds,
        "num_evaluations": num_requests // e.batch_size,
        "num_requests": num_requests,
        "num_eval_requests": evaluation,
        "tokens": tokens or None,
        "money": price_of(e).of(Cost(num_requests + evaluation, tokens)) if e.served.prices else None,
        "downlink_bytes": down,
        "uplink_bytes": up,
        "seconds": None if e.url is not None else num_requests * _seconds_of_one(setup) / setup.programs.num_shards,
    }


def _seconds_of_one(setup: Setup) -> float:
    in_flight = setup.experiment.chunk_size * setup.experiment.batch_size
    return seconds_of_answers(setup.box, setup.programs.method, setup.task.train, in_flight) / in_flight


def forecast_line(cost: Row) -> str:
    """Returns a forecast as a line for people.

    Example:
      >>> counts = {"num_rounds": 2, "num_requests": 160, "downlink_bytes": 90, "uplink_bytes": 80}
      >>> forecast_line({**counts, "num_eval_requests": 9, "tokens": None, "money": None, "seconds": 61.0})
      'would cost 160 requests in 2 rounds and 9 for evaluation, 90 bytes down and 80 up, about 1.0 minutes of answers'
    """
    seconds = cost["seconds"]
    asked = f"{cost['num_requests']:,} requests in {cost['num_rounds']:,} rounds"
    asked += f" and {cost['num_eval_requests']:,} for evaluation"
    sent = f"{cost['downlink_bytes']:,} bytes down and {cost['uplink_bytes']:,} up"
    if cost["tokens"] is not None:
        sent += f", about {cost['tokens']:,} tokens"
    if cost["money"] is not None:
        sent += f", about {cost['money']:.2f} in money"
    if seconds is None:
        return f"would cost {asked}, {sent}"
    spell = f"{seconds:.0f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"
    return f"would cost {asked}, {sent}, about {spell} of answers"

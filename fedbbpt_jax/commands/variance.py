"""`fedbbpt variance`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from fedbbpt_jax.commands.output import check_json_target, write_json_to
from fedbbpt_jax.training.laboratory import Study, prepare_study, run_study
from fedbbpt_jax.training.laboratory_report import closing_lines, study_table, write_parquet, write_study_figure
from fedbbpt_jax.training.records import create_folder, write_json


@dataclass(frozen=True)
class Variance:
    """Measures gradient estimators against the true gradient: what their error is made of, beside theory.

    Attributes:
      study: what to measure.
      output_dir: a new folder for the results; runs/variance-<time> if left out.
      json: write the findings as JSON to this file, - for standard output.
      quiet: print nothing but errors.
    """

    study: tyro.conf.OmitArgPrefixes[Study] = field(default_factory=Study)
    output_dir: Path | None = None
    json: str | None = None
    quiet: bool = False


def variance_command(command: Variance) -> int:
    """Makes one study into one new folder."""
    folder = command.output_dir or Path("runs") / f"variance-{time.strftime('%Y%m%d-%H%M%S')}"
    check_json_target(command.json, folder)
    console = Console(quiet=command.quiet, stderr=True)
    landscape = prepare_study(command.study)  # bad input ends here, before anything is written
    create_folder(folder)
    with console.status("drawing trials") as status:
        findings = run_study(command.study, landscape, lambda line: status.update(line))
    content = {"study": asdict(command.study), **findings._asdict()}
    write_json(folder / "variance.json", content)
    write_parquet(folder / "variance.parquet", findings)
    write_study_figure(folder / "variance.png", findings)
    console.print(study_table(findings))
    for line in closing_lines(findings):
        console.print(line, highlight=False)
    console.print(f"results in {folder}")
    if command.json is not None:
        write_json_to(command.json, content)
    return 0

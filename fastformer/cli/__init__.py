"""The command line: `fastformer compare`, `info`, `verify`, `tune` and `bench`."""

import typer

from fastformer.cli import bench, compare, info, tune, verify
from fastformer.cli.errors import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    help="Fused transformer kernels: what they gain on this machine, and what this machine has.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(compare.compare)
app.command()(info.info)
app.command()(verify.verify)
app.command()(tune.tune)
app.command()(bench.bench)

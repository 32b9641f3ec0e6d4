"""`python -m fastformer.cli` is `fastformer`."""

from fastformer.cli import app

app(prog_name="fastformer")

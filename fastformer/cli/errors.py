"""How the command line tells its user that something cannot be done: one line on stderr, exit status 2."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

UsageError: type[Exception] = typer.BadParameter.__base__  # what typer raises for every wrong option, value or command


class UserError(Exception):
    """Something that the user asked for cannot be done; the message is one line that says what and why."""


class OneLineErrors(TyperGroup):
    """A command group that prints its errors in one line instead of usage text and boxes."""

    def main(self, *args: Any, **kwargs: Any) -> None:
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except UserError as error:
            fail(str(error))
        except UsageError as error:
            fail(f"{error.format_message().rstrip('.')} (see fastformer --help)")
        sys.exit(status)


def fail(message: str) -> None:
    print("fastformer:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

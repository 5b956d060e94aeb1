"""How every command speaks: tables and JSON on standard output, remarks, progress and errors on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from medvit.errors import MedvitError

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console


@contextmanager
def errors() -> Iterator[None]:
    """One line instead of a traceback for what a user can mend."""
    try:
        yield
    except MedvitError as error:
        logging.getLogger("medvit").debug("traceback", exc_info=True)
        say(f"medvit: {error}")
        raise typer.Exit(1) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep remarks of other libraries off the terminal: they may quote headers, and so name patients."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def console() -> Console:
    """Standard error, as rich draws on it."""
    from rich.console import Console

    return Console(stderr=True)


def progress(items: Iterable[dict[str, Any]], what: str, total: int, name: str) -> Iterator[dict[str, Any]]:
    """A bar on a terminal; a line on standard error for each item, with its ``name`` and status, when piped."""
    screen = console()
    if not screen.is_terminal:
        for number, item in enumerate(items, 1):
            say(f"{number}/{total} {item[name] or item['files'][0]}: {item['status']}")
            yield item
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn(what), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=screen) as progress:
        yield from progress.track(items, total=total, description="")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; tab-separated lines when piped; nothing without rows."""
    if not rows:
        return
    cells = [[one_line(value) for value in row] for row in (header, *rows)]
    if not sys.stdout.isatty():
        for row in cells:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*header)
    for row in cells[1:]:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def one_line(value: object) -> str:
    """Text without line ends and tabs; bytes of a file name that are no UTF-8 become escapes."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text.translate(dict.fromkeys(map(ord, "\t\n\r"), " "))


def say(text: str) -> None:
    """One line on standard error."""
    typer.echo(one_line(text), err=True)


def emit(record: dict[str, Any]) -> None:
    """One JSON line on standard output."""
    typer.echo(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def end_with_cause() -> None:
    """From now on an uncaught exception ends the output with its first cause, whatever was raised on top of that.

    For recipes, as a step of ``initialize``: MONAI says of every failure that a component could not be made. What a
    user can mend is said alone, without a traceback.
    """
    shown = sys.excepthook

    def ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        chain = [error]
        while (below := chain[-1].__cause__) is not None:
            chain.append(below)
        mendable = next((cause for cause in chain if isinstance(cause, MedvitError)), None)
        if mendable is not None:
            say(f"medvit: {mendable}")
            return
        shown(kind, error, trace)
        if len(chain) > 1:
            say(f"medvit: the cause was {type(chain[-1]).__name__}: {chain[-1]}")

    sys.excepthook = ended

"""Official constructor arguments translated by the tables in ``docs/``, so that the tables are what the tests use."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1]
_NAME = re.compile(r"`(\w+)")


def spelled(document):
    """Official argument name to ours, or None where there is none here."""
    table, within = {}, False
    for line in (DOCS / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        within = line.startswith("|") and (within or cells[:2] == ["authors", "here"])
        theirs = _NAME.match(cells[0])
        if within and theirs:
            ours = _NAME.match(cells[1])
            table[theirs[1]] = ours[1] if ours else None
    return table


def translate(document, constructor):
    """Our keyword arguments for an official constructor's; raises KeyError for a name the document lacks."""
    table = spelled(document)
    return {table[name]: value for name, value in constructor.items() if table[name] is not None}

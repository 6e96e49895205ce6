"""The command line: `flashtile demo`, `flashtile info`, `flashtile explain`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """The console script. typer and rich are an extra: without them, say how to get them."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        needs = f"flashtile's command line needs {' and '.join(missing)}"
        print(f"{needs}: pip install 'flashtile[cli]'", file=sys.stderr)
        raise SystemExit(2)
    from flashtile.cli.app import app  # noqa: PLC0415  needs the extra

    app()

"""The id under which a service knows a run, kept in the run's folder so that a resumed run goes on with it."""

from __future__ import annotations

import secrets

from .tracker import Run


class KeptId:
    """`value` is the id that was kept, if the run goes on; `None` for one that begins."""

    def __init__(self, run: Run, service: str) -> None:
        self._path = run.folder / f".{service}-id" if run.folder is not None else None
        goes_on = run.resumed is not None and self._path is not None and self._path.exists()
        self.value = self._path.read_text().strip() if goes_on and self._path is not None else None

    def keep(self, value: str) -> str:
        """Keep an id for the time when the run goes on."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(value)
        return value

    def make(self, name: str = "") -> str:
        """Keep a new id: a name for people, and eight hexadecimal digits."""
        return self.keep("-".join(filter(None, [name, secrets.token_hex(4)])))

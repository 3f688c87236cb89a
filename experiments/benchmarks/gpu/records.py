"""Records of the GPU benchmark: one line of JSON for each part that was tried, written at once."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mac.run.io.logger import append_row, read_rows

if TYPE_CHECKING:
    from experiments.benchmarks.gpu.schedule import Outcome


class Records:
    """Outcomes of this and earlier calls in one file; the newest of a part counts.

    Only those of the same card count, since figures of two cards do not make one table.

    Attributes:
        path: the file.
        origin: what every new line says of its origin: card, commit, versions, command.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]):
        """Reads the file, if it exists.

        Raises:
            UserError: it cannot be read.
        """
        self.path, self.origin = path, dict(origin)
        rows = list(read_rows(path)) if path.exists() else []
        self.rows = [row for row in rows if row.get("card") == self.origin["card"]]

    def add(self, part: str, outcome: "Outcome") -> None:
        """Writes an outcome.

        Raises:
            UserError: the file cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"part": part, "status": outcome.status, "seconds": round(outcome.seconds, 1), "time": now}
        row |= {"reason": outcome.reason} if outcome.reason else {}
        row |= {"result": dict(outcome.result)} if outcome.result else {}
        row |= self.origin
        append_row(self.path, row)
        self.rows.append(row)

    def newest(self, part: str) -> dict[str, Any] | None:
        """Returns the newest line of a part that has a result, else its newest line, if any."""
        lines = [row for row in self.rows if row["part"] == part]
        with_result = [row for row in lines if "result" in row]
        return next(reversed(with_result or lines), None)

    def results(self, kind: str) -> dict[str, dict[str, Any]]:
        """Returns the results of all parts of one kind, by their names."""
        names = dict.fromkeys(row["part"] for row in self.rows if row["part"].split()[0] == kind)
        found = {name: self.newest(name) for name in names}
        return {name: row["result"] for name, row in found.items() if row and "result" in row}

    def last_reason(self, part: str) -> str:
        """Returns the reason in the newest line of a part; empty without one."""
        return next((row.get("reason", "") for row in reversed(self.rows) if row["part"] == part), "")

    def done(self, part: str) -> bool:
        """Returns whether a part was measured to its end."""
        return self.count(part, "done") > 0

    def count(self, part: str, *statuses: str) -> int:
        """Returns how often a part ended in one of these ways."""
        return sum(row["part"] == part and row["status"] in statuses for row in self.rows)

    def longest(self, part: str) -> float:
        """Returns the most seconds that a part took without coming to its end."""
        lines = [row for row in self.rows if row["part"] == part and row["status"] == "overran"]
        return max((row["seconds"] for row in lines), default=0.0)

    def attempts(self, part: str) -> int:
        """Returns how often a part began and was not finished."""
        return self.count(part, "failed", "overran")

"""The one exception that a user, not a bug, causes."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Report something that the user can mend; the command line prints it and exits with status 2.

    The message names the file, line or key, the value found, the rule broken and the remedy.
    """


class ConfigError(UserError):
    """Report *all* problems of a configuration at once.

    Args:
        problems: one complete sentence each: key, value, rule and remedy.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(
            f"configuration: {head}, nothing was started\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        )

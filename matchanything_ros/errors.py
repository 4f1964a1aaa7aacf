"""The one error that is shown to a user."""

from __future__ import annotations


class UserError(Exception):
    """One sentence that says what is wrong and what to do about it.

    The command line prints it and exits with status 1; the node logs it and reports it in its diagnostics.
    Everything else that is raised is a defect of ours and keeps its traceback.
    """

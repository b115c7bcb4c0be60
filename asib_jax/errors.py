"""The one kind of error that the person who starts a run can mend: a key, a file, a machine."""


class UserError(ValueError):
    """Its message says what is wrong and where, what would be right, and which key to change.

    Everything else that is raised is a mistake of ours, or of the machine's.
    """

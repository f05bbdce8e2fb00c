"""The one exception that is the caller's fault.

Its message is one line that states the value, the limit and the fix; the command line prints it
and exits with code 2. Anything else that is raised is a bug of ours, and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input: a file, a prompt or a parameter. Message: the value, the limit and the fix."""

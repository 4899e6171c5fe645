"""The one exception for mistakes a user can mend; the commands show it as one line, exit code 2."""


class UserError(ValueError):
    """Says what is wrong, what was seen, and what would be right, in one line."""

"""From what a user types after ``--model`` to a directory of weights on this machine."""

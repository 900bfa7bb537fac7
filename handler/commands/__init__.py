"""One module for each command of `firstlight`."""

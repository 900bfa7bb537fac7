"""The kernels of a GPU one by one: how they are timed, what limits them, and one module a kind."""

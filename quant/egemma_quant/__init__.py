"""Float to integer: the one place where a weight is rounded."""

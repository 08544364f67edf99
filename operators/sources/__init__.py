"""From a SOURCE argument to rows: list objects, cut them into pieces, read a piece."""

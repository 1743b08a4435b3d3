"""One file a benchmark: `run(config) -> dict` of figures, printing a table on the way."""

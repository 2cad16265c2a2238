"""Several methods trained for the same time on the same data, and a page that shows what came of it."""

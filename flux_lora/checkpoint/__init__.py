"""A weights directory: found and checked, fetched, read, and made into pipelines."""

"""What the teacher says about a view: what a cache is of, and how its records are coded."""

"""The networks behind the `student` section, one file per family."""

"""Published teachers: one file per family of layouts."""

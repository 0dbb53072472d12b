"""Which pixels a model sees: what a view is, its pinned plan, its pixels, and persons in it."""

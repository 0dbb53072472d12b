"""Stored targets beside those that a teacher gives: which samples, what was seen, what it says."""

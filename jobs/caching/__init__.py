"""What `dpal cache` does: shards through a frozen teacher, on Ray."""

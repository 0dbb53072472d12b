"""Bytes, shards and order: everything between a bucket and a batch."""

"""What `dpal preview` draws."""

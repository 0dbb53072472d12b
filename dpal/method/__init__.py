"""The methods: one Task each."""

"""A stand-in for the package safetensors where it is not installed: tests/test_export.py puts its folder last on the path."""

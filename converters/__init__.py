"""The recipes of convert.py, one module a format of public sets. They read; they number, sort and write nothing."""

"""The merge operators, one family per file."""

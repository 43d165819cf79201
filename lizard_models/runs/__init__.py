"""Whole runs: from a teacher's name to a folder, or to a plan of what it would cost."""

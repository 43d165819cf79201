"""Runs under faults: signals, kills, full disks, damaged files; what is lost, different, half-written."""

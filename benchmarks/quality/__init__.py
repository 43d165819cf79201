"""Evidence: every table of docs/results.md as rows that train, measure and leave one JSON file each."""

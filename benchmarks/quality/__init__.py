"""Evidence: rows that train, are measured and leave one record each, and the tables that are written from these."""

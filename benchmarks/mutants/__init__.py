"""Can the tests fail? Small faults, put into the code one at a time, and the share that the tests notice."""

"""Long runs beside the tests: faults at random, soaks, fuzzing, and mutants."""

"""What follows from the turns of two versions: looks, changes of times, exact comparisons, outcomes."""

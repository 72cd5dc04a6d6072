"""Whether a change made something worse: two versions of this code, measured in turns and judged."""

"""The forms in which a claim can be judged: on records, and on the figures of the paper."""

"""Measure, judge and report: everything around the method that turns runs into verdicts."""

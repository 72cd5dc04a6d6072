"""Everything that lies under suites/, as validated data."""

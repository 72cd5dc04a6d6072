"""Pictures by matplotlib, which is imported when one is drawn: it comes with the extra `plots`."""

"""From the command line to one run, one sweep or one task."""

"""The sources of preference rows, one file for each data set."""

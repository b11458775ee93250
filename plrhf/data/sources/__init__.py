"""One file a data set: where its rows come from and how they are read."""

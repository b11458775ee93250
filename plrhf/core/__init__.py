"""The lowest wing: types, losses, log-probabilities, statistics, errors. It needs torch only."""

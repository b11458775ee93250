"""Ground floor: types, losses, log-probabilities, statistics, errors; torch only."""

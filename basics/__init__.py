"""The ground floor: what knows nothing of the method."""

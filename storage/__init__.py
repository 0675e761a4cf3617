"""Every format on disk."""

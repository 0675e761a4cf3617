"""What a user does: train, reconstruct, detect, evaluate."""

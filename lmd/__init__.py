"""What a user does: train, reconstruct, detect, evaluate; calibrate a detector and predict.

`Detector`, `Prediction` and `open_model` are imported when they are first used, since they bring torch.
"""

__all__ = ["Detector", "Prediction", "open_model"]


def __getattr__(name):
    if name in __all__:
        from lmd import detector, trained_model  # here, as they take seconds

        return getattr(trained_model if name == "open_model" else detector, name)
    raise AttributeError(f"module 'lmd' has no attribute '{name}'")

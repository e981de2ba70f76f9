"""Re-exports the trainers of `nnunetv2_hyspark.trainers`; nnU-Net imports this module from `nnUNet_extTrainer`."""
from nnunetv2_hyspark._startup import find_class


def __getattr__(name: str) -> type:
    """The trainer class of that name, which keeps its real module, so that it pickles and stays one class."""
    trainer = None if name.startswith("_") else find_class("nnunetv2_hyspark.trainers", name)
    if trainer is None:
        raise AttributeError(f"nnunetv2_hyspark has no trainer called {name}.")
    return trainer

"""HySparK pre-training of hybrid CNN-transformer encoders as an nnU-Net v2 extension.

Imported at every start of the interpreter (see `_startup`), so nothing but the standard library may be imported here.
"""
import os

__version__ = "0.1.0"


def _checkout_root(package_folder: str) -> str | None:
    """The repository root if this package runs from a checkout, where `trainers/` and `planners/` lie beside it.

    None once they are inside, as in a wheel, and where the folder above is not our repository: site-packages may well
    hold a stranger's package called `trainers`.
    """
    root = os.path.dirname(package_folder)
    if os.path.isdir(os.path.join(package_folder, "trainers")) or not os.path.isdir(os.path.join(root, "trainers")):
        return None
    try:
        with open(os.path.join(root, "setup.cfg"), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return root if "name = nnunetv2-hyspark" in lines else None


# Makes nnunetv2_hyspark.trainers and .planners importable when the package is run from the checkout itself.
if _root := _checkout_root(os.path.dirname(os.path.abspath(__file__))):
    __path__.append(_root)

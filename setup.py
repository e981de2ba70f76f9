"""The one thing setup.cfg cannot say: the packages found by looking, plus the folders that are mapped into them."""
from setuptools import find_packages, setup

PACKAGE = "nnunetv2_hyspark"
MAPPED_FOLDERS = ("trainers", "planners")  # see package_dir in setup.cfg


def packages() -> list[str]:
    """Every package below nnunetv2_hyspark/, and trainers/ and planners/ under the names they install as."""
    found = find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
    for folder in MAPPED_FOLDERS:
        found.append(f"{PACKAGE}.{folder}")
        found.extend(f"{PACKAGE}.{folder}.{inner}" for inner in find_packages(folder))
    return found


setup(packages=packages())

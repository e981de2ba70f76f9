"""Build time only: puts the start-up files beside the package, in wheels and in editable wheels."""
from pathlib import Path

from setuptools.command.build_py import build_py

# Python executes a line of a .pth file that begins with "import" at every start, and prints a traceback if it fails.
# So a package that has gone (an editable install whose checkout was deleted) is passed over; any other error shows.
_PTH_LINE = (
    r'import sys; exec("try:\n import nnunetv2_hyspark._startup as startup\n startup.install()\n'
    r"except ModuleNotFoundError as error:\n if error.name != 'nnunetv2_hyspark': raise"
    '")\n'
)
_START_LINE = "nnunetv2_hyspark._startup:install\n"  # Python 3.15 and later read this file instead (PEP 829)


class BuildPyWithStartup(build_py):
    """`build_py` that also writes `nnunetv2_hyspark.pth` and `nnunetv2_hyspark.start` to the top of site-packages."""

    def run(self) -> None:
        super().run()
        # in editable mode build_lib never reaches the wheel, but install_lib is the folder that is packed
        site = Path(self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib)
        site.mkdir(parents=True, exist_ok=True)
        (site / "nnunetv2_hyspark.pth").write_text(_PTH_LINE, encoding="utf-8")
        (site / "nnunetv2_hyspark.start").write_text(_START_LINE, encoding="utf-8")

"""Packaging: everything is read from settings.ini, so that each fact stands in one place."""
import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


class BuildWithBook(build_py):
    """Copy the source notebooks and presets into the package, so that an installed kdbook can run its chapters."""

    def run(self):
        super().run()
        target = Path(self.build_lib) / settings["lib_path"] / "_book"
        shutil.rmtree(target, ignore_errors=True)
        for pattern in ("nbs/**/*.ipynb", "presets/**/*.yaml"):
            for source in sorted(HERE.glob(pattern)):
                if ".ipynb_checkpoints" in source.parts:
                    continue
                copy = target / source.relative_to(HERE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=settings["git_url"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    python_requires=">=" + settings["min_python"],
    packages=find_packages(include=["kdbook", "kdbook.*"]),
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    package_data={settings["lib_name"]: ["registry/*.json"]},
    entry_points={"console_scripts": settings["console_scripts"].split("\n")},
    cmdclass={"build_py": BuildWithBook},
    zip_safe=False,
)

"All that describes the package stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
data = [str(p.relative_to(here / "data")) for p in (here / "data").rglob("*") if p.is_file()]
readme = here / "README.md"

setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=["lora_nb", "lora_nb.cli", "lora_nb.live", "lora_nb.studio", "lora_nb.zoo", "lora_nb.data"],
    package_dir={"lora_nb.data": "data"},
    package_data={"lora_nb": ["py.typed", "*.pyi"], "lora_nb.cli": ["*.pyi"], "lora_nb.live": ["*.pyi", "page/*"],
                  "lora_nb.studio": ["*.pyi", "*.css", "*.js"],
                  "lora_nb.zoo": ["*.pyi"], "lora_nb.data": data},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "completion": cfg["completion_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["lora_nb = lora_nb._modidx:d"]},
)

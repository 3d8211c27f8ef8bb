"""Prints the requirements of setup.cfg, one per line: python .ci/requirements.py EXTRA...

--without-torch leaves out torch, and packages that would install it. For `make newest-test`.
"""

import configparser
import re
import sys
from pathlib import Path

NEED_TORCH = {"accelerate", "diffusers", "peft", "torch", "torchvision"}

setup = configparser.ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg")
extras = [word for word in sys.argv[1:] if word != "--without-torch"]
texts = [setup["options"]["install_requires"]]
texts += [setup["options.extras_require"][extra] for extra in extras]
for line in "\n".join(texts).split("\n"):
    name = re.match(r"[\w.-]+", line)
    if name and not ("--without-torch" in sys.argv and name.group() in NEED_TORCH):
        print(line)

# Setup, the same in every notebook. In a clone it installs nothing. On Colab, write your clone's address here:
REPOSITORY = ""  # such as "https://github.com/NAME/PROJECT"

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

if importlib.util.find_spec("lm") is None:  # else it is installed, or on the path, and there is nothing to do
    clones = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "lm" / "__init__.py").exists()]
    clone = clones[0] if clones else Path.cwd() / "lm-clone"
    if "google.colab" in sys.modules:
        if not clone.exists():
            if not REPOSITORY:
                raise SystemExit("Write your clone's address into REPOSITORY at the top of this cell; run it again.")
            if subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(clone)]).returncode:
                raise SystemExit(f"git cannot clone REPOSITORY = {REPOSITORY!r}: correct the address, run it again.")
        # A JAX that is new enough stays as it is. An older one is replaced together with its accelerator's plugin:
        # a new JAX beside an old plugin would run on the CPU.
        found = {each.metadata["Name"]: each.version for each in metadata.distributions()}
        if [int(number) for number in re.findall(r"\d+", found.get("jax", "0"))[:3]] >= [0, 10, 2]:
            jax_packages = [f"{name}=={found[name]}" for name in ("jax", "jaxlib") if name in found]
        elif "jax-cuda13-plugin" in found:
            jax_packages = ["jax[cuda13]>=0.10.2"]
        elif "jax-cuda12-plugin" in found or shutil.which("nvidia-smi"):
            jax_packages = ["jax[cuda12]>=0.10.2"]
        else:
            jax_packages = ["jax[tpu]>=0.10.2" if "libtpu" in found else "jax>=0.10.2"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-r", str(clone / "requirements.txt"), *jax_packages]
        if subprocess.run(pip).returncode:
            raise SystemExit(f"pip could not install what lm needs; its error is above. Command: {' '.join(pip)}")
    elif not clones:
        raise SystemExit("There is no lm here. Open this notebook in its clone, after pip install -r requirements.txt.")
    sys.path.insert(0, str(clone))

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

from cdm_toolkit.artifacts.provenance import provenance


def test_says_what_made_an_artifact():
    made = provenance(
        ["cdm", "distill", "--data", "my file"], fingerprints={"teacher": "ab"}, seed=3, device="cpu"
    )
    assert made["command"] == "cdm distill --data 'my file'"
    assert {"cdm-toolkit", "python", "torch", "transformers"} <= made["versions"].keys()
    assert (made["fingerprints"], made["seed"], made["device"]) == ({"teacher": "ab"}, 3, "cpu")
    age = datetime.now(UTC) - datetime.fromisoformat(made["made"])
    assert 0 <= age.total_seconds() < 60
    assert json.loads(json.dumps(made)) == made


def test_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from cdm_toolkit.artifacts import maps, exports; maps.provenance();"
        "print({'torch', 'transformers', 'numba', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""``ranks_program.py`` with VLLMServerEngine: both ranks sample from one server, whose address is an argument.

python server_ranks_program.py FOLDER ADDRESS '{"NAME": [ARGUMENT, ...], ...}'
"""

import json
import sys

from ranks_program import RUN
from short_runs import fit_all

if __name__ == "__main__":
    root, address, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    common = [argument for argument in RUN if not argument.startswith("--data.engine")]
    engine = ["--data.engine=VLLMServerEngine", f"--data.engine.address={address}"]
    fit_all(root, {name: [*common, *engine, *arguments] for name, arguments in runs.items()})

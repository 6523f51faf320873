"""What the real SmolLM2-135M-Instruct does: after `boig reproduce --llm smollm2`, `python bench/smollm2.py` records it in bench/results/smollm2.json."""
import json
from pathlib import Path

import pandas as pd

from boig.core import project_root, write_json

results = project_root()/"results"/"pocket-smollm2"
record = {"what": "boig reproduce --llm smollm2", "stages": {}, "answers": []}
for name in ("boig_llm", "boig_llm_plain"):
    stage = json.loads((results/"provenance"/f"{name}.json").read_text(encoding="utf-8"))
    record["stages"][name] = {"seconds": stage["seconds"], "parameters": {k: v for k, v in stage["parameters"].items() if k not in ("results", "run_dir")}}
    record |= {k: stage["provenance"][k] for k in ("time", "commit", "changed_since_commit", "cpu", "cores", "threads", "packages")}
bench = pd.read_parquet(results/"data"/"emojibench.parquet").set_index("id")
for name in ("boig_llm", "boig_llm_plain"):
    answers = pd.read_parquet(results/"data"/f"{name}.parquet")
    record["stages"][name] |= {f"free answers {k}": int(answers[f"free_{k}"].iloc[0]) for k in ("n", "read", "clean")}
    record["answers"] += [{"model": name, "told": r.condition, "told KPIs": r.told, "drawing": bench.loc[r["id"], "name"],
                           "truth": bench.loc[r["id"], "verbalization"], "answer": r.answer} for _, r in answers.iterrows()]
write_json(Path(__file__).parent/"results"/"smollm2.json", record)

"""What another training of BoigSD would have given: python bench/boigsd.py RESULTS FOLDER [SEED ...] trains it anew with the pocket scale's settings and other seeds, and writes bench/results/boigsd.json.

RESULTS is a finished pocket run: its captions, its BoigLLM. All trainings have the same captions and are looked at on the same noise; a seed changes what training draws. The run's own seed gives its own training again. Stopped, it goes on from FOLDER.
Intervals of one training are over captions, that of all is Student's, over trainings."""
import copy
import sys
from pathlib import Path

import pandas as pd
from scipy import stats

from boig.behaviour.boigsd import PromptReward, Watch, all_looks, load_rewards, load_tuned, look, pick, requests
from boig.benches.instructions import ENDINGS
from boig.core import derive_seed, provenance, write_json
from boig.diffusion.ddpo import DDPOConfig, train_ddpo
from boig.metrics.fid import load_features
from boig.metrics.verbalization_metrics import bootstrap_means
from boig.perception.verbalizer import load_verbalizer
from boig.scales import load_scale

OUT = Path(__file__).parent/"results"/"boigsd.json"
COLUMNS = ["reward", "oracle", "tokens", "objects", "warm"]


def main(results: Path, folder: Path, seeds: list[int]):
    scale = load_scale("pocket")
    s, benches = scale.boig_sd, scale.boig_sd.benches.split(",")
    asked = pd.concat([requests(pd.read_parquet(results/"data"/f"{b}.parquet"), b, s.wish) for b in benches], ignore_index=True)
    train = pick(asked, "train", s.train_each, scale.seed)
    valid = pick(asked, "valid", s.valid_each, scale.seed, without=train.prompt)
    rewards = load_rewards({b: results/"models"/f"boig_llm{ENDINGS[b]}" for b in benches}, load_verbalizer(s.verbalizer))
    form, rank, number = s.variants.split(",")[0].split(":")
    rows = []
    for seed in seeds:
        pipe, own = load_tuned(s.base), folder/str(seed)
        watch = Watch(copy.deepcopy(pipe.unet), {"valid": (valid, 2)}, rewards, own, dict(num_inference_steps=s.sampling_steps, guidance_scale=s.guidance), {},
                      load_features(s.feature_judge), s.epochs, s.epochs, derive_seed(scale.seed, "watch"))
        look(watch, pipe, 0)
        config = DDPOConfig.fast(epochs=s.epochs, samples=s.samples, batch_size=s.batch_size, micro_batch=s.micro_batch, steps=s.sampling_steps, guidance=s.guidance,
                                 reach=s.reach, lr=s.learning_rate, lora_rank=int(rank), seed=derive_seed(seed, "ddpo", number), tracker="")
        log = train_ddpo(pipe, list(train.prompt), PromptReward(rewards, train), own, config, watch=watch, progress=False)
        seen = all_looks(own)
        start, end = (seen[seen.done == d].reset_index(drop=True) for d in (0, s.epochs))
        found = bootstrap_means((end[COLUMNS] - start[COLUMNS]).to_numpy(), 2000, scale.seed, end.prompt)
        rows.append({"seed": seed, "reward in training, first five epochs": log.reward[:5].mean(), "last five": log.reward[-5:].mean()}
                    | {c: {"gain": g, "low": lo, "high": hi} for c, g, lo, hi, _ in zip(COLUMNS, *found)})
        print(rows[-1])
    gains = pd.DataFrame([{c: r[c]["gain"] for c in COLUMNS} for r in rows])
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.sem()
    write_json(OUT, {"about": "bench/boigsd.py: the pocket scale's BoigSD, trained with several seeds; gains on validation captions.", "form": form, "captions": len(valid), "trainings": rows,
                     "over trainings": {c: {"gain": gains[c].mean(), "low": gains[c].mean() - half[c], "high": gains[c].mean() + half[c]} for c in COLUMNS}, "provenance": provenance()})


if __name__ == "__main__": main(Path(sys.argv[1]), Path(sys.argv[2]), [int(x) for x in sys.argv[3:]] or [42, 43, 44])

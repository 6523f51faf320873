"""How fast BoigBench is chosen at the paper's size: `python bench/boigbench.py` writes bench/results/boigbench.json.

It makes its own posts (168 million rows need about 6 GB in --folder and some minutes), or takes those that are there, then measures thresholds, balance, split and
writing in a process of its own. Harder than the real thing: every row is a photo of the last five years, no account and no picture is sampled away beforehand, and rows
come in random order.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from boig.benches.boigbench import RULES, choose_pictures
from boig.benches.x_api import POSTS
from boig.core import provenance, write_json

RESULTS = Path(__file__).parent/"results"/"boigbench.json"
ACCOUNTS, START, END = 10_135, "2018-01-01", "2023-01-01"
RULE = replace(RULES["boigbench"], start=START, end=END, accounts=0, pictures=0)
WORDS = "new our the best shop now discover summer winter sale today love style home more your free made with care".split()


def repeated(values, index):
    "Text from a short list, one for each index."
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(values)).cast(pa.string())


def make_posts(path, rows, seed=0, chunk=1_000_000):
    "Posts in random order: account sizes, popularity and luck are log-normal; about a third of the tweets have no like."
    rng = np.random.default_rng(seed)
    size, popularity = np.cumsum(rng.lognormal(0, 1.5, ACCOUNTS)), rng.lognormal(1.0, 1.8, ACCOUNTS)
    names = [f"brand{i:05d}" for i in range(ACCOUNTS)]
    texts = [" ".join(rng.choice(WORDS, 16)) for _ in range(5000)]
    first, last = (np.datetime64(d, "ms").astype(int) for d in (START, END))
    with pq.ParquetWriter(path, POSTS, compression="zstd") as writer:
        for done in range(0, rows, chunk):
            n = min(chunk, rows - done)
            account, when = np.searchsorted(size, rng.random(n) * size[-1]), rng.integers(first, last, n)
            ids = pa.array((when - 1288834974657 << 22) + rng.integers(0, 2**22, n)).cast(pa.string())
            likes = rng.poisson(popularity[account] * rng.lognormal(-0.5, 1.3, n))
            columns = {"tweet_id": ids, "media_key": pc.binary_join_element_wise("3", ids, "_"), "account": repeated(names, account), "created_at": pa.array(when * 1000, pa.timestamp("us")),
                       "text": repeated(texts, rng.integers(0, len(texts), n)), "likes": pa.array(likes), "type": repeated(["photo"], np.zeros(n)),
                       "width": pa.array(np.full(n, 1200, np.int32)), "height": pa.array(np.full(n, 675, np.int32)), "number": pa.array(np.ones(n, np.int16))}
            writer.write_table(pa.table([columns.get(f.name, pa.nulls(n, f.type)) for f in POSTS], schema=POSTS), row_group_size=250_000)


def peak_mb():
    "The most memory that this process ever held."
    status = Path("/proc/self/status")
    if status.exists(): return int(next(l for l in status.read_text().splitlines() if l.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(posts, out, memory, threads, exact):
    "One build: seconds, memory and what came out."
    start, used = time.perf_counter(), time.process_time()
    report = choose_pictures(posts, out, replace(RULE, exact=exact), memory, threads)
    return {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - used, 1), "peak_rss_mb": round(peak_mb()),
            "pictures": report.buckets.groupby("bucket").pictures.sum().to_dict(), "test": report.buckets[report.buckets.split == "test"].set_index("bucket").pictures.to_dict(),
            "output_mb": round(out.stat().st_size / 1e6), "ties": report.ties.round(4).to_dict("records")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=168_000_000)
    parser.add_argument("--folder", type=Path, default=Path(gettempdir())/"boigbench", help="for the posts, kept for the next time, and the output, removed")
    parser.add_argument("--memory", default="600MB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="exact sampling")
    parser.add_argument("--measure", action="store_true", help="(the process that is measured)")
    args = parser.parse_args()
    posts, out = args.folder/f"posts_{args.rows}.parquet", args.folder/f"chosen_{args.rows}.parquet"
    if args.measure: print(json.dumps(measure(posts, out, args.memory, args.threads, args.exact))); sys.exit()
    if not posts.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        start, tmp = time.perf_counter(), posts.with_suffix(".tmp")
        make_posts(tmp, args.rows)
        tmp.rename(posts)
        print(f"{args.rows:,} rows, {posts.stat().st_size / 1e9:.2f} GB, made in {time.perf_counter() - start:.0f} s", flush=True)
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure"], check=True, stdout=subprocess.PIPE, text=True)
    out.unlink()
    record = {"rows": args.rows, "accounts": ACCOUNTS, "threads": args.threads, "memory_limit": args.memory, "sampling": "exact" if args.exact else "hash", **json.loads(child.stdout)}
    print(json.dumps(record, indent=1))
    write_json(RESULTS, record | {"input_mb": round(posts.stat().st_size / 1e6), "provenance": provenance()})

#!/usr/bin/env bash
# Fills corpus/ with small files of every kind, from tests/data and from moepress itself.
set -euo pipefail
cd "$(dirname "$0")"
data=../tests/data
moepress() { cargo run --quiet --release --manifest-path ../Cargo.toml -- "$@" >/dev/null; }
mkdir -p corpus/{header,index,config,plan,tokens,statistics,layout}

# Two windows of four tokens, and a mask: a length of eight bytes, a header of 120, the data.
header='{"ids":{"dtype":"I32","shape":[2,4],"data_offsets":[0,32]},"mask":{"dtype":"U8","shape":[2,4],"data_offsets":[32,40]}}  '
{
    printf '\x78\0\0\0\0\0\0\0%s' "$header"
    for id in 1 2 3 4 5 6 7 63; do printf "\\x$(printf %02x "$id")\0\0\0"; done
    printf '\1\1\1\1\1\1\1\0'
} >corpus/tokens/masked

moepress calibrate "$data/mixtral" --tokens corpus/tokens/masked --quiet --out corpus/statistics/mixtral
moepress plan --method reap --remove 0.4 --stats corpus/statistics/mixtral --quiet --out corpus/plan/reap
moepress plan --method low-rank --remove 0.4 --model "$data/mixtral" --quiet --out corpus/plan/low_rank
cp corpus/tokens/masked corpus/header/tokens
cp "$data/deepseek_v2_lite_sharded_bf16/model-00002-of-000006.safetensors" corpus/header/shard
for config in "$data"/*/config.json; do cp "$config" "corpus/config/$(basename "$(dirname "$config")")"; done
echo '{"metadata": {"total_size": 2}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}' >corpus/index/two
echo '{"moepress": 1, "origin": {"method": "x"}, "layers": [{"layer": 0, "top_k": 2, "experts": [{"expert": 0, "form": "dense"},
{"expert": 1, "form": "low_rank", "rank": {"gate": 4, "up": 6, "down": null}}, {"expert": 3, "form": "alias", "of": 0},
{"expert": 4, "form": "constant"}]}]}' >corpus/layout/all
